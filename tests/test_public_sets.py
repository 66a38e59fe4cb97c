"""Tuned systems of a small comparison on a small set with choices."""

import csv
import json

import numpy as np
import pytest
from small import small

from configs.public_sets import get_config
from experiments import compare_strategies, public_sets
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker

pytestmark = pytest.mark.slow  # whole experiments, if small ones


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison, and beside it an MMLU of two subjects, of one of which the passages tell."""
    folder = tmp_path_factory.mktemp("runs")
    config = small()
    config.strategies, config.regimes = ("none", "ralt"), ("federated",)
    config.learning_rates.federated.ralt = 1e-3
    world = synthetic.generate()
    wrong = ["Nowhere at all", "Nobody at all", "Nothing at all"]
    rows = [
        {"question": e.question, "choices": [e.answer, *wrong], "answer": 0, "subject": "told"}
        for e in world.test
        if e.hops == 1 and len(e.answer) > 5
    ][:24]
    rows += [
        {
            "question": f"Who is {i}?",
            "choices": [*wrong, "Everyone"],
            "answer": 3,
            "subject": "untold",
        }
        for i in range(8)
    ]
    with open(folder / "mmlu.jsonl", "w") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps({"id": f"m{i}", "split": "test"} | row) + "\n")
    return run(compare_strategies.EXPERIMENT, config, str(folder))


def asking(compared):
    config = get_config()
    config.of, config.regimes, config.questions = str(compared), ("federated",), 20
    config.wandb.mode = "disabled"
    return config


def test_subjects_are_asked_of_which_passages_tell_something(compared, monkeypatch):
    monkeypatch.setenv("FEDRAG_DATA", str(compared.parent))
    config = asking(compared)
    folder = run(public_sets.EXPERIMENT, config, str(compared.parent))
    with open(folder / "groups.csv", newline="") as file:
        groups = {row["group"]: row for row in csv.DictReader(file)}
    assert groups["told"]["asked"] == "yes" and float(groups["told"]["coverage"]) > 0.3
    assert not groups["untold"]["asked"] and float(groups["untold"]["coverage"]) == 0
    assert (groups["told"]["questions"], groups["untold"]["questions"]) == ("24", "8")

    with open(folder / "public_sets.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["questions"] for row in rows} == {"20"}
    ways = {(row["way"], row["corpus"]) for row in rows}
    assert ways == {(way, c) for way in ("likelihood", "letters") for c in ("own", "none")}
    lab = public_sets.lab(config, folder)
    left_out = {f"m{i}" for i in range(24, 32)}
    assert lab.left_out() == left_out
    for strategy in ("none", "ralt"):
        system = lab.tuned(strategy, "federated", 0, 0)
        own = Benchmarker(system).run("mmlu", by="letters", exclude=left_out, limit=20)
        cell = cells.load(folder / "letters-own", strategy, "federated", 0, 0)
        right = [row["scores"]["accuracy"] for row in own.rows]
        assert [*cell.scores["accuracy"]] == right

    # A difference that is found four times in five is 2.8 standard errors, and goes with 1/sqrt(N).
    row = next(r for r in rows if r["strategy"] == "ralt" and r["metric"] == "accuracy")
    half = (float(row["high"]) - float(row["low"])) / 2
    assert float(row["detectable"]) == pytest.approx(2.8 * half / 1.96)
    assert float(row["detectable_100"]) == pytest.approx(float(row["detectable"]) * np.sqrt(0.2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"benchmark": "boolq"}, "boolq has no choices; take mmlu or hellaswag"),
        ({"ways": ("guess",)}, r"config.ways: \['guess'\] unknown"),
        ({"corpora": ("all",)}, r"config.corpora: \['all'\] unknown"),
        ({"coverage": 2.0}, "coverage in .0, 1., got 1500 and 2.0"),
        ({"strategies": ("lsr",)}, "no finished cell"),
    ],
)
def test_what_cannot_be_asked_is_refused(compared, tmp_path, change, message, monkeypatch):
    monkeypatch.setenv("FEDRAG_DATA", str(compared.parent))
    config = asking(compared)
    config.questions = 1500
    config.update(change)
    with pytest.raises(ConfigError, match=message):
        run(public_sets.EXPERIMENT, config, str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_set_that_no_passage_tells_of_is_said(compared, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAG_DATA", str(compared.parent))
    config = asking(compared)
    config.coverage = 1.0
    with pytest.raises(ConfigError, match=r"no group of mmlu has 1; the most is 0\.\d+ of 'told'"):
        run(public_sets.EXPERIMENT, config, str(tmp_path))
