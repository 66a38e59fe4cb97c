"""`fedrag ask`: answers with their sources, whole or as they are written."""

import io
import json
import os
import subprocess
import sys

import pytest
from documents import FEDRAG, QUESTIONS, told

from fedrag_jax.cli.command_line import main
from fedrag_jax.cli.common import harmless
from fedrag_jax.rag import RAGSystem


def test_asking_prints_answers_and_sources(system, capsys, monkeypatch):
    asked = [e.question for e in QUESTIONS[:3]]
    expected = RAGSystem.load(system).batch_query(asked)
    assert main(["ask", str(system), *asked, "--json"]) == 0
    found = told(capsys)
    assert [f["answer"] for f in found] == [r.answer for r in expected]
    assert [[s["id"] for s in f["sources"]] for f in found] == [
        [p.id for p in r.sources] for r in expected
    ]
    assert main(["ask", str(system), asked[0], "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  [1] ") and lines[2].startswith("  [2] ") and lines[3] == ""
    assert main(["ask", str(system), asked[0], "--stream", "--no-sources"]) == 0
    assert capsys.readouterr().out == expected[0].answer + "\n"
    for more in ([], ["--stream"]):
        assert main(["ask", str(system), *asked[:2], *more]) == 0
        told_of = [s for s in capsys.readouterr().out.splitlines() if s.startswith("> ")]
        assert told_of == [f"> {question}" for question in asked[:2]]
    for more in ([], ["--stream"]):
        assert main(["ask", str(system), asked[0], "--max-tokens", "1", *more]) == 0
        assert "(cut after 1 tokens; --max-tokens allows more)" in capsys.readouterr().err
    for more in ([], ["--stream"], ["--json"]):
        assert main(["ask", str(system), asked[0], " ", *more]) == 1
        assert "question" in (err := capsys.readouterr().err) and "is blank: ask something" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    assert main(["ask", str(system), "--json"]) == 0
    assert [f["answer"] for f in told(capsys)] == [r.answer for r in expected]


@pytest.mark.parametrize("more", [[], ["--stream"], ["--json"]])
@pytest.mark.parametrize("given", [False, True])
def test_a_question_that_cannot_be_asked_costs_no_other_its_answer(
    system, capsys, monkeypatch, given, more
):
    asked = [QUESTIONS[0].question, "word " * 3000, QUESTIONS[1].question]
    expected = [r.answer for r in RAGSystem.load(system).batch_query([asked[0], asked[2]])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    more = more if "--json" in more else ["--no-sources", *more]
    assert main(["ask", str(system), *(asked if given else []), *more]) == 1
    told = capsys.readouterr()
    found = told.out.splitlines()
    if "--json" in more:
        found = [json.loads(line)["answer"] for line in found]
    assert [line for line in found if not line.startswith("> ")] == expected
    assert "fedrag ask: question 2: " in told.err


@pytest.mark.parametrize(
    ("terminal", "given", "streamed"),
    [(True, [], 1), (True, ["--no-stream"], 0), (True, ["--mode=vote"], 0), (False, [], 0)],
)
def test_answers_appear_as_they_are_written_on_a_terminal(
    system, monkeypatch, terminal, given, streamed
):
    calls, stream = [], RAGSystem.stream
    monkeypatch.setattr(RAGSystem, "stream", lambda *a, **k: calls.append(a) or stream(*a, **k))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["ask", str(system), QUESTIONS[0].question, *given]) == 0
    assert len(calls) == streamed


def test_passages_do_not_speak_to_the_terminal(tmp_path, capsys):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("Ada \x1b[31mlives\x1b]0;x\x07 in Rome.\u202e")
    assert (
        main(["index", str(documents), "--to", str(tmp_path / "s"), "--quiet", "--top-k", "1"]) == 0
    )
    assert main(["ask", str(tmp_path / "s"), "Where does Ada \x1b[31m live?"]) == 0
    out = capsys.readouterr().out
    assert "Ada" in out and not {"\x1b", "\x07", "\u202e"} & {*out}
    assert main(["ask", str(tmp_path / "\x1b[31m"), "Who?"]) == 1
    assert "\x1b" not in capsys.readouterr().err
    # No-break space, a tab, and what joins no letters in Persian.
    assert harmless("Qui\u00a0?\n\t\u0646\u200c\u062e") == "Qui ?\n \u0646\u200c\u062e"


def test_what_cannot_be_asked_is_refused(system, tmp_path, capsys):
    for arguments, error in (
        ([str(tmp_path), "x"], "holds no saved RAGSystem"),
        ([str(system), "x", "--mode", "poem"], "mode must be one of"),
        ([str(system), "x", "--top-k", "0"], "k must be at least 1"),
        ([str(system), "x", "--stream", "--json"], "choose one"),
        ([str(system), "x", "--max-tokens", "0"], "max_new_tokens"),
        ([str(system), "x", " "], "question 2 is blank: ask something"),
    ):
        assert main(["ask", *arguments]) == 1
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["ask"])
    assert refused.value.code == 2


def test_an_empty_system_prompt_takes_that_of_the_system_away(system, tmp_path, capsys):
    plain = RAGSystem.load(system)
    plain.under("Answer in one word.").save(tmp_path / "told")
    command = [
        "ask",
        str(tmp_path / "told"),
        QUESTIONS[0].question,
        "--system-prompt",
        "",
        "--json",
    ]
    assert main(command) == 0
    (answer,) = told(capsys)
    assert answer["answer"] == plain.query(QUESTIONS[0].question).answer


def test_characters_that_the_locale_cannot_spell_are_escaped(tmp_path):
    (tmp_path / "a.txt").write_text("Ada lives in Rome.")
    command = [*FEDRAG, "index", str(tmp_path / "a.txt"), "--to", str(tmp_path / "schlüssel")]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert b"schl\\xfcssel: 1 passages of 1 documents" in run.stdout


def test_questions_in_another_encoding_are_told(system, monkeypatch, capsys):
    latin = io.TextIOWrapper(io.BytesIO("Wer wohnt in München?\n".encode("latin-1")), "utf-8")
    monkeypatch.setattr(sys, "stdin", latin)
    assert main(["ask", str(system), "--json"]) == 1
    assert "standard input is not utf-8 text" in (err := capsys.readouterr().err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ask", "Who?", "--json", "--no-sources"], "--no-sources does not apply to --json"),
        (["ask", "Who?", "--mode=search", "--top-k=2"], "do not apply to --mode=search"),
        (["ask", "Who?", "--mode=search", "--system-prompt="], "do not apply to --mode=search"),
        (["serve", "--mcp=stdio", "--port=1"], "--host and --port do not apply to --mcp=stdio"),
        (["eval", "mmlu", "--all"], "--all is about --questions"),
        (["eval", "--questions=q.jsonl", "--all", "--split=train"], "leave out --split train"),
        (["eval", "mmlu", "--json", "--form=text"], "--json prints none: leave either out"),
    ],
)
def test_options_that_would_be_ignored_are_refused(system, options, words, capsys):
    assert main([options[0], str(system), *options[1:]]) == 1
    assert words in capsys.readouterr().err
