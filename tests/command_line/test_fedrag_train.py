"""`fedrag train`: a tuned system in a folder of its own, and what cannot be trained."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from documents import QUESTIONS, told, write_questions

from fedrag_jax.cli.command_line import main
from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import flatten
from fedrag_jax.rag import RAGSystem
from fedrag_jax.systems import training


def unsave(folder):
    """Leaves what a training had there when it was killed before it saved its system."""
    for part in folder.iterdir():
        if part.is_dir() and part.name != "training":
            shutil.rmtree(part)
        elif part.is_file():
            part.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["centralised", "federated"])
def test_training_tunes_and_keeps_the_store(system, tmp_path, capsys, regime):
    questions = write_questions(tmp_path / "own.jsonl", system)
    command = [
        "train", str(system), str(questions), "--to", str(tmp_path / "tuned"), "--regime", regime,
        "--strategy", "retriever", "--clients", "2", "--rounds", "3", "--factors", "1", "10", "--json",
    ]  # fmt: skip
    assert main(command) == 0
    (result,) = told(capsys)
    before, after = (result["validation"][when]["mrr"] for when in ("before", "after"))
    assert after > before
    assert {t["factor"] for t in result["trials"]} == {1, 10}
    tuned, old = (RAGSystem.load(f) for f in (tmp_path / "tuned", system))
    assert {p.id for p in tuned.store.passages()} == {p.id for p in old.store.passages()}
    asked = [QUESTIONS[0].question]
    assert tuned.retrieve(asked) != old.retrieve(asked)
    assert main(command) == 1
    assert "holds a system already" in capsys.readouterr().err
    # Killed before it was saved: the trainings are read back, but not for another system.
    unsave(tmp_path / "tuned")
    assert main(command) == 0
    assert told(capsys)[0]["trials"] == result["trials"]
    unsave(tmp_path / "tuned")
    tuned.under("Be brief.").save(tmp_path / "another")
    command[1] = str(tmp_path / "another")
    assert main(command) == 1
    assert "holds a training with other settings: system was" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    to = ["--to", str(tmp_path / "tuned")]
    assert main(["train", str(system), str(questions), *to, "--strategy", "poem"]) == 1
    assert "unknown strategy 'poem'; choose among ['none', 'retriever'" in capsys.readouterr().err
    bare = [json.loads(line) | {"positive_ids": []} for line in questions.read_text().splitlines()]
    questions.write_text("\n".join(map(json.dumps, bare)))
    assert main(["train", str(system), str(questions), *to, "--strategy", "retriever"]) == 1
    assert "needs gold passages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--algorithm", "fedsgd"], "--algorithm: unknown algorithm 'fedsgd'; choose among ['fedavg'"),
        (["--algorithm", "fedprox", "--algorithm-options", "mu"], "'mu' is not NAME=VALUE"),
        (["--algorithm", "fedprox", "--algorithm-options", "nu=1"], "unknown options ['nu'] of fedp"),
        (["--algorithm", "fedprox", "--algorithm-options", "mu=-1"], "mu must be at least 0, got -1"),
        (["--algorithm", "fedprox", "--regime", "centralised"], "add --regime=federated"),
        (["--algorithm-options", "up=int8", "--regime", "centralised"], "add --regime=federated"),
        (["--algorithm", "scaffold"], "give --query-rate and --adapter-rate"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--local-steps", "0"], "--local-steps must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--clients", "-1"], "--clients must be at least 0, got -1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--max-answer-tokens", "0"], "--max-answer-tokens must be at least 1, got 0"),
        (["--factors", "1", "nan"], "--factors: learning rates must be above 0, got nan"),
        (["--factors", "0"], "--factors: learning rates must be above 0, got 0"),
        (["--query-rate", "-1"], "--query-rate: learning rates must be above 0, got -1"),
        (["--adapter-rate", "inf"], "--adapter-rate: learning rates must be above 0, got inf"),
        (["--alpha", "nan"], "--alpha must be above 0, got nan"),
        (["--alpha", "0.1", "--regime", "centralised"], "--alpha 0.1 is about the split"),
        (["--alpha", "0.1", "--clients", "0"], "--alpha 0.1 is about the split"),
    ],
)  # fmt: skip
def test_options_that_cannot_train_are_refused(options, words, tmp_path, capsys):
    to = ["--to", str(tmp_path / "tuned"), "--regime", "federated"]
    assert main(["train", "system", "own.jsonl", *to, *options]) == 1  # before either is read
    assert words in capsys.readouterr().err


def test_a_training_that_failed_before_a_trial_stands_for_no_other(
    system, tmp_path, capsys, monkeypatch
):
    def failing(*_, **__):
        raise ConfigError("no answers today")

    monkeypatch.setattr(training, "_scored", failing)
    questions = write_questions(tmp_path / "own.jsonl", system)
    command = ["train", str(system), str(questions), "--to", str(tmp_path / "tuned"), "--rounds"]
    for rounds in "12":
        assert main([*command, rounds]) == 1
        assert "no answers today" in capsys.readouterr().err
    begun = tmp_path / "tuned" / "training" / "times-1" / "joint_token"
    begun.mkdir(parents=True)
    (begun / "rounds.jsonl").write_text("")
    assert main([*command, "1"]) == 1
    assert "holds a training with other settings: budget was" in capsys.readouterr().err


def test_a_folder_is_of_one_training_with_all_that_it_depends_on(
    system, tmp_path, capsys, monkeypatch
):
    def failing(*_, **__):
        raise ConfigError("as far as it goes")

    monkeypatch.setattr(training, "_scored", failing)
    questions = write_questions(tmp_path / "own.jsonl", system)
    command = ["train", str(system), str(questions), "--to", str(tmp_path / "tuned")]
    begun = tmp_path / "tuned" / "training" / "times-1" / "joint_token"
    begun.mkdir(parents=True)
    assert main(command) == 1
    (begun / "rounds.jsonl").write_text("")
    assert main(command) == 1 and "as far as it goes" in capsys.readouterr().err
    assert main([*command, "--max-answer-tokens", "4"]) == 1
    refused = "holds a training with other settings: "
    assert refused + "max_answer_tokens was 16, is 4. Choose" in capsys.readouterr().err
    old = RAGSystem.load(system)
    for change, words in (
        ({"marginal_k": 3}, "marginal_k was 10, is 3. Choose"),
        ({"searching": old.searching._replace(passages=9)}, "searching was {'instruction'"),
    ):
        other = tmp_path / next(iter(change))
        dataclasses.replace(old, **change).save(other)
        assert main(["train", str(other), *command[2:]]) == 1
        assert refused + words in capsys.readouterr().err
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    questions.write_text("\n".join(json.dumps(row | {"reasoning": "As told."}) for row in rows))
    assert main(command) == 1 and refused + "reasoning was" in capsys.readouterr().err


@pytest.mark.slow
def test_training_by_an_algorithm_keeps_the_base_that_it_changed(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    command = [
        "train", str(system), str(questions), "--to", str(tmp_path / "tuned"), "--regime", "federated",
        "--strategy", "generator", "--clients", "2", "--rounds", "1", "--factors", "1", "--json",
        "--algorithm", "fedex", "--algorithm-options", "weighting=uniform",
    ]  # fmt: skip
    assert main(command) == 0
    (result,) = told(capsys)
    tuned, old = (RAGSystem.load(f) for f in (tmp_path / "tuned", system))
    before, after = (dict(flatten(s.generator.params)) for s in (old, tuned))
    changed = {path[-2] for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {*old.decoder.lora.targets}
    unsave(tmp_path / "tuned")
    assert main([*command[:-1], "weighting=examples"]) == 1
    assert "holds a training with other settings: algorithm_options was" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["validation"] == result["validation"]
    # What takes minutes with a language model says so before it begins, and what it came to.
    steps = (
        r"before training: answering \d+ validation questions\nbefore training: em [\d.]+, f1 .*"
    )
    assert re.search(steps, printed.err)
    assert "rates times 1 (1 of 1): training\n" in printed.err


def test_answers_whose_ends_are_not_trained_on_are_told(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    long = next(i for i, row in enumerate(rows) if row["split"] == "train")
    rows = [row | {"positive_ids": []} for row in rows]  # refused, but after it is told
    rows[long]["answers"] = ["", "It was opened in the spring of the year after the flood. " * 2]
    questions.write_text("\n".join(map(json.dumps, rows)))
    command = ["train", str(system), str(questions), "--to", str(tmp_path / "tuned"), "--strategy"]
    command.append("retriever")
    assert main(command) == 1
    said = re.search(
        r"1 of \d+ training answers are longer than 16 tokens .* --max-answer-tokens=(\d+)",
        capsys.readouterr().err,
    )
    assert int(said[1]) > 20
    assert main([*command, "--max-answer-tokens", said[1]]) == 1
    assert "training answers are longer" not in capsys.readouterr().err
