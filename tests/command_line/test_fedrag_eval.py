"""`fedrag eval`: own questions are measured, and their gold ids are those of what was indexed."""

import json

import numpy as np
import pytest
from documents import PASSAGES, QUESTIONS, told, write_questions

from fedrag_jax.cli.command_line import main
from fedrag_jax.rag import RAGSystem


def test_own_questions_are_measured_where_training_leaves_them(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    command = ["eval", str(system), "--questions", str(questions), "--quiet"]
    assert main([*command, "--json", "--to", str(tmp_path / "results")]) == 0
    (result,) = told(capsys)
    assert result["n"] == len(QUESTIONS[3::4]) and result["settings"]["split"] == "test"
    expected = RAGSystem.load(system).batch_query([e.question for e in QUESTIONS[3::4]])
    right = [r.answer in e.answers for r, e in zip(expected, QUESTIONS[3::4], strict=True)]
    assert result["metrics"]["em"]["mean"] == pytest.approx(100 * np.mean(right), abs=5)
    assert main([*command, "--limit", "4", "--form", "markdown"]) == 0
    assert "| own" in capsys.readouterr().out
    assert main([*command, "--limit", "4", "--rule", "ja", "--json"]) == 0
    assert told(capsys)[0]["settings"]["rule"] == "ja"
    for more, error in (
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--shots", "999"], "own: 999 few-shot examples leave no question to ask; choose fewer"),
    ):
        assert main([*command, *more]) == 1
        assert error in capsys.readouterr().err
    assert main(["eval", str(system)]) == 1
    assert "nothing to measure" in capsys.readouterr().err


def test_truncated_prompts_are_told(system, tmp_path, capsys):
    row = {"question": "word " * 5000, "answers": ["a"], "split": "test"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    command = ["eval", str(system), "--questions", str(tmp_path / "own.jsonl"), "--quiet"]
    assert main(command) == 0
    assert ", 100% of prompts truncated, " in capsys.readouterr().out


def test_gold_ids_are_those_of_what_was_indexed(tmp_path, capsys):
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    long = QUESTIONS[0].positive_ids[0]
    for row in rows:
        if row["id"] == long:
            row["text"] = "Of nothing in particular it is said. " * 30 + row["text"]
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    system = str(tmp_path / "system")
    index = ["index", str(tmp_path / "passages.jsonl"), "--to", system, "--quiet"]
    assert main(index) == 0
    capsys.readouterr()
    ids = {p.id for p in RAGSystem.load(system).store.passages()}
    assert {p.id for p in PASSAGES} - ids == {long} and {f"{long}#0", f"{long}#1"} <= ids
    questions = [
        {"id": e.id, "question": e.question, "answers": e.answers, "positive_ids": e.positive_ids,
         "split": ("train", "validation", "test")[i % 3]}
        for i, e in enumerate(QUESTIONS)
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    ask = ["eval", system, "--questions", str(path), "--quiet", "--json", "--all"]
    train = ["train", system, str(path), "--to", str(tmp_path / "tuned"), "--clients", "999"]
    train += ["--regime", "federated"]  # refused after the questions are read

    def write(golds=()):
        for question, some in zip(questions, golds, strict=False):
            question["positive_ids"] = some
        path.write_text("\n".join(map(json.dumps, questions)))

    write()
    assert main(ask) == 0
    (result,) = told(capsys)
    n = result["n"]
    assert result["metrics"]["recall_at_5"]["n"] == n == len(questions)
    assert 0 < result["metrics"]["mrr"]["mean"] < 100
    write(3 * [["nobody"]])
    with pytest.warns(UserWarning, match=r"own: 3 of 64 positive_ids name none of the 6\d pass"):
        assert main(ask) == 0
    assert told(capsys)[0]["metrics"]["recall_at_5"]["n"] == n - 3
    with pytest.warns(
        UserWarning, match=r"own.jsonl: 3 of \d+ positive_ids .* 'nobody' first; left"
    ):
        assert main(train) == 1
    assert "999 clients" in capsys.readouterr().err
    write(len(questions) * [["nobody"]])
    for command in (ask, train):
        assert main(command) == 1
        assert "'nobody' first: give the ids of passages as" in capsys.readouterr().err
