"""`fedrag`: from documents to answers, measures, a tuned system and a service, by real processes."""

import io
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_pdf import PdfPages

from fedrag_jax.cli.command_line import main
from fedrag_jax.cli.common import harmless
from fedrag_jax.data import synthetic
from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.network import flatten
from fedrag_jax.rag import RAGSystem
from fedrag_jax.systems import indexing
from fedrag_jax.systems.journal import Journal

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:60]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e for e in [*WORLD.train, *WORLD.validation, *WORLD.test] if {*e.positive_ids} <= HELD]
FEDRAG = (
    sys.executable,
    "-c",
    "import sys; from fedrag_jax.cli.command_line import main; sys.exit(main(sys.argv[1:]))",
)


def write_documents(folder: pathlib.Path, passages=PASSAGES) -> pathlib.Path:
    """A file for each of the first, the others in one of JSON lines."""
    folder.mkdir()
    for p in passages[:20]:
        (folder / f"{p.id}.txt").write_text(p.text)
    lines = (json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in passages[20:])
    (folder / "more.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """The folder of a system over documents."""
    folder = tmp_path_factory.mktemp("cli")
    documents = write_documents(folder / "documents")
    assert main(["index", str(documents), "--to", str(folder / "system"), "--quiet"]) == 0
    return folder / "system"


def told(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- index -----------------------------------------------------------------------------------------


def test_a_system_follows_its_documents(tmp_path, capsys):
    documents, folder = write_documents(tmp_path / "documents"), tmp_path / "system"
    command = ["index", str(documents), "--to", str(folder), "--json", "--quiet"]
    assert main(command) == 0
    (first,) = told(capsys)
    assert (first["files"], first["passages"], first["added"]) == (21, 60, 60)
    assert main(command) == 0
    (again,) = told(capsys)
    assert (again["added"], again["changed"], again["removed"]) == (0, 0, 0)
    one, other, gone = (documents / f"{p.id}.txt" for p in PASSAGES[:3])
    one.write_text("Nobody lives in Xanadu.")
    gone.unlink()
    (documents / "new.md").write_text("# Names\n\nA *new* one.")
    assert main(command) == 0
    (changed,) = told(capsys)
    assert (changed["added"], changed["changed"], changed["removed"]) == (1, 1, 1)
    store = RAGSystem.load(folder).store
    assert store.get([f"{one.name}#0"])[0].text == "Nobody lives in Xanadu."
    held = {p.id for p in store.passages()}
    assert f"{gone.name}#0" not in held and {f"{other.name}#0", "new.md#0"} <= held


def test_the_vectors_of_a_system_are_those_of_its_passages(system):
    loaded = RAGSystem.load(system)
    passages = [*loaded.store.passages()][::7]
    for passage, vector in zip(passages, loaded.embed(passages), strict=True):
        (best,) = loaded.store.search([""], vector[None], 1)[0]
        assert best.passage == passage and best.score == pytest.approx(1, abs=1e-5)


def test_what_was_embedded_before_a_kill_is_not_embedded_again(tmp_path, monkeypatch, capsys):
    documents, folder = write_documents(tmp_path / "documents"), tmp_path / "system"
    monkeypatch.setattr(indexing, "AT_ONCE", 16)
    embedded, embed = [], RAGSystem.embed

    def counted(self, passages):
        if len(embedded) == 32:
            raise KeyboardInterrupt
        embedded.extend(p.id for p in passages)
        return embed(self, passages)

    monkeypatch.setattr(RAGSystem, "embed", counted)
    command = ["index", str(documents), "--to", str(folder), "--quiet"]
    assert main(command) == 130
    assert not (folder / "system.json").exists()
    before, embedded[:] = [*embedded], []
    monkeypatch.setattr(
        RAGSystem, "embed", lambda s, some: (embedded.extend(p.id for p in some), embed(s, some))[1]
    )
    assert main(command) == 0
    assert len(before) == 32 and len(embedded) == 28 and not {*before} & {*embedded}
    assert len(RAGSystem.load(folder).store) == 60


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    documents, folder = tmp_path / "documents", tmp_path / "system"
    documents.mkdir()
    texts = [{"id": i, "text": f"{p.text} {i}"} for i, p in enumerate(WORLD.passages * 4)]
    (documents / "all.jsonl").write_text("\n".join(map(json.dumps, texts)))
    command = [*FEDRAG, "index", str(documents), "--to", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    journal, heard = folder / indexing.JOURNAL, ""
    while "embed:" not in heard:  # all files are read by then
        heard += (part := os.read(process.stderr.fileno(), 4096)).decode()
        assert part, heard
    log = journal.with_name(journal.name + "-wal")
    begun = log.stat().st_size
    while log.stat().st_size < begun + 200_000:  # of vectors
        assert process.poll() is None, heard
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Journal(journal) as opened:
        kept = opened._database.execute("SELECT count(*) FROM vectors").fetchone()[0]
    assert 0 < kept < len(texts)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["passages"] == len(texts)
    assert f"0/{len(texts) - kept} " in done.stderr  # what is left to embed


def test_documents_that_cannot_be_read_are_left_out_and_told(tmp_path, capsys):
    documents, folder = write_documents(tmp_path / "documents"), tmp_path / "system"
    command = ["index", str(documents), "--to", str(folder), "--json", "--quiet"]
    (documents / "bad.jsonl").write_text('{"text": 1}')
    (documents / "latin.txt").write_bytes(b"caf\xe9 in Rome")
    assert main(command) == 3
    printed = capsys.readouterr()
    assert {*json.loads(printed.out)["unreadable"]} == {"bad.jsonl", "latin.txt"}
    assert "latin.txt: byte 3 is not utf-8-sig" in printed.err
    # What the system had of a file stays while it cannot be read.
    (documents / f"{PASSAGES[0].id}.txt").write_bytes(b"\xff\xfe\xff")
    assert main(command) == 3
    assert told(capsys)[0]["passages"] == 60


def test_what_is_no_document_is_told_each_time(tmp_path, capsys):
    documents, folder = tmp_path / "documents", tmp_path / "system"
    command = ["index", str(documents), "--to", str(folder), "--quiet"]
    documents.mkdir()
    (documents / "a.txt").write_text("Ada lives in Rome.")
    for name in ("b.docx", "c.csv", *(f"{i:02}.png" for i in range(25))):
        (documents / name).write_text("x")
    (documents / "link").symlink_to(tmp_path)
    with PdfPages(documents / "scan.pdf") as pages:
        for show in (lambda page: page.text(0.1, 0.5, "Bob"), lambda page: page.figimage([[0, 1]])):
            page = plt.figure()
            show(page)
            pages.savefig(page)
            plt.close(page)
    for _ in range(2):  # read, and remembered
        assert main(command) == 3
        told = capsys.readouterr().err
        assert re.search("^left out: b.docx: .docx files are not read", told, re.M)
        assert re.search("^left out: c.csv: .csv files are not read", told, re.M)
        assert re.search("^left out: link: a link to a folder, which is not followed", told, re.M)
        assert re.search("^left out: .*scan.pdf: of its 2 pages .* not read: 2; recog", told, re.M)
        assert re.search("^left out: 00.png, .*, 19.png and 5 more: .png files", told, re.M)
    (documents / "scan.pdf").unlink()
    assert main([*command, "--json"]) == 3
    unreadable = json.loads(capsys.readouterr().out)["unreadable"]
    assert len(unreadable) == 28 and "scan.pdf" not in unreadable


def test_files_of_a_user_may_be_called_as_ours(tmp_path, capsys):
    documents, folder = tmp_path / "documents", tmp_path / "system"
    documents.mkdir()
    (documents / "a.txt").write_text("Ada lives in Rome.")
    own = {"system.json": '{"os": "linux"}', "store.json": '["milk", "bread"]'}
    for name, text in own.items():
        (documents / name).write_text(text)
    assert main(["index", str(documents), "--to", str(folder), "--quiet"]) == 3
    told = capsys.readouterr()
    assert "1 passages of 1 documents" in told.out
    assert "left out: store.json, system.json: .json files are not read" in told.err
    for what in (
        lambda: main(["index", str(tmp_path / "system"), "--to", str(documents), "--quiet"]),
        lambda: main(["train", str(folder), "x.jsonl", "--to", str(documents)]),
    ):
        assert what() == 1
        assert "system.json is not of a saved system and would be lost" in capsys.readouterr().err
    system = RAGSystem.load(folder)
    for save, kind in ((system.save, "system"), (system.store.save, "store")):
        with pytest.raises(
            CheckpointError, match=f"{kind}.json is not of a saved {kind} and would"
        ):
            save(documents)
    assert {name: (documents / name).read_text() for name in own} == own
    assert {path.name for path in documents.iterdir()} == {"a.txt", *own}


def test_indexing_refuses_what_would_lose_something(system, tmp_path, capsys):
    documents = write_documents(tmp_path / "documents", PASSAGES[:21])
    for more, error in (
        (["--store", "hnsw"], "holds a system already, and --store are of a new one"),
        ([], "holds the documents of .*/documents, not of"),
        (["--moved", "--tokens", "1000000"], "encoder reads [0-9]+ tokens of a passage"),
    ):
        assert main(["index", str(documents), "--to", str(system), "--quiet", *more]) == 1
        assert re.search(error, capsys.readouterr().err)
    new = ["index", str(documents), "--to", str(tmp_path / "new"), "--quiet"]
    for more, error in (
        (["--store", "qdrant"], "--store=qdrant needs --at"),
        (["--at", "x"], "--at is of qdrant and postgres"),
        (["--like", str(system), "--generator", "x"], "--like takes models and prompts"),
        (["--language", "english"], "--language is of words and hybrid"),
    ):
        assert main([*new, *more]) == 1
        assert error in capsys.readouterr().err
    assert main(["index", str(documents), "--to", str(documents), "--quiet"]) == 1
    assert "choose a folder of its own for the system" in capsys.readouterr().err
    assert not (documents / indexing.JOURNAL).exists()
    (documents / "other.jsonl").write_text('{"id": "a", "text": "A"}')
    (documents / "same.jsonl").write_text('{"id": "a", "text": "A"}')
    assert main(new) == 1
    told = capsys.readouterr().err
    assert "other.jsonl and same.jsonl both hold a passage of the id 'a': give one" in told
    with Journal(system / indexing.JOURNAL):
        assert main(["index", str(documents), "--to", str(system), "--quiet", "--moved"]) == 1
    assert "another process that indexes" in capsys.readouterr().err
    (system.parent / "damaged").mkdir()
    (system.parent / "damaged" / indexing.JOURNAL).write_bytes(b"nonsense" * 999)
    new[3] = str(system.parent / "damaged")
    assert main(new) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_system_leaves_a_store_of_others_alone(tmp_path, capsys):
    place = ["--store", "qdrant", "--at", str(tmp_path / "qdrant"), "--quiet"]
    for name, text in (("a", "Ada lives in Rome."), ("b", "Bob lives in Oslo.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(text)
    assert main(["index", str(tmp_path / "a"), "--to", str(tmp_path / "one"), *place]) == 0
    other = ["index", str(tmp_path / "b"), "--to", str(tmp_path / "other"), *place]
    assert main(other) == 1
    assert "holds 1 passages of others, such as 'a.txt#0'" in capsys.readouterr().err
    assert main([*other, "--collection", "mine"]) == 0
    assert main(["ask", str(tmp_path / "one"), "Who?", "--elsewhere", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["id"] for s in answer["sources"]] == ["a.txt#0"]


def test_a_system_among_its_documents_is_no_document(tmp_path, capsys):
    write_documents(tmp_path / "documents", PASSAGES[:21])
    command = ["index", str(tmp_path), "--to", str(tmp_path / "system"), "--quiet", "--json"]
    for added in (21, 0, 0):
        assert main(command) == 0
        (found,) = told(capsys)
        assert (found["passages"], found["added"], found["removed"]) == (21, added, 0)


def test_passages_keep_their_size_and_names_may_be_bytes(tmp_path, capsys):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "long.txt").write_text("Ada lives in Rome. " * 100)
    (documents / os.fsdecode(b"caf\xe9.txt")).write_text("Bob lives in Oslo.")
    command = ["index", str(documents), "--to", str(tmp_path / "s"), "--quiet", "--json"]
    assert main([*command, "--tokens", "50"]) == 3
    (first,) = told(capsys)
    assert {*first["unreadable"]} == {"caf\\udce9.txt"}
    assert main(command) == 3
    (again,) = told(capsys)
    assert again["passages"] == first["passages"] > 5 and not again["changed"] + again["removed"]
    assert main([*command, "--tokens", "90"]) == 3
    assert told(capsys)[0]["passages"] < first["passages"]


@pytest.mark.parametrize("kind", ["hnsw", "hybrid", "qdrant"])
def test_other_stores(system, tmp_path, capsys, kind):
    documents = system.parent / "documents"
    command = ["index", str(documents), "--to", str(tmp_path / "new"), "--quiet", "--store", kind]
    if kind == "qdrant":
        command += ["--at", str(tmp_path / "qdrant")]
    assert main(command) == 0
    capsys.readouterr()
    ask = ["ask", str(tmp_path / "new"), QUESTIONS[0].question, "--json"]
    if kind == "qdrant":
        assert main(ask) == 1
        assert "the passages lie elsewhere" in capsys.readouterr().err
        ask.append("--elsewhere")
    assert main(ask) == 0
    assert len(told(capsys)[0]["sources"]) == 5


def test_a_new_system_like_a_tuned_one(system, tmp_path):
    tuned = RAGSystem.load(system)
    tuned = tuned.replace(query={**tuned.retriever.query}).under("Be brief.")
    tuned.save(tmp_path / "tuned")
    command = ["index", str(system.parent / "documents"), "--to", str(tmp_path / "new"), "--quiet"]
    like = ["--like", str(tmp_path / "tuned"), "--store", "words", "--top-k", "3"]
    assert main([*command, *like]) == 0
    loaded = RAGSystem.load(tmp_path / "new")
    assert loaded.store.kind == "bm25" and loaded.prompts.style == tuned.prompts.style
    assert loaded.top_k == 3 and not loaded.retriever.passages


# --- ask -------------------------------------------------------------------------------------------


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
    ):
        assert main(["ask", *arguments]) == 1
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["ask"])
    assert refused.value.code == 2


# --- eval and train --------------------------------------------------------------------------------


def write_questions(path: pathlib.Path, system: pathlib.Path) -> pathlib.Path:
    """Those of the world, with the ids that the index gave their passages."""
    ids = {p.id.split(":")[-1].split(".txt")[0].split("#")[0]: p.id
           for p in RAGSystem.load(system).store.passages()}  # fmt: skip
    with open(path, "w") as file:
        for i, e in enumerate(QUESTIONS):
            row = {"id": e.id, "question": e.question, "answers": e.answers, "topic": e.topic}
            row["positive_ids"] = [ids[p] for p in e.positive_ids]
            row["split"] = ("train", "train", "validation", "test")[i % 4]
            file.write(json.dumps(row) + "\n")
    return path


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
    assert main(["eval", str(system)]) == 1
    assert "nothing to measure" in capsys.readouterr().err


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
    train = ["train", system, str(path), "--to", str(tmp_path / "tuned"), "--factors", "0"]

    def write(golds=()):
        for question, some in zip(questions, golds, strict=False):
            question["positive_ids"] = some
        path.write_text("\n".join(map(json.dumps, questions)))

    write()
    assert main(ask) == 0
    (result,) = told(capsys)
    n = result["n"]
    assert result["metrics"]["recall_at_5"]["n"] == n > 1
    assert 0 < result["metrics"]["mrr"]["mean"] < 100
    write(3 * [["nobody"]])
    with pytest.warns(UserWarning, match=r"own: 1 of \d+ positive_ids name none of the 6\d pass"):
        assert main(ask) == 0
    assert told(capsys)[0]["metrics"]["recall_at_5"]["n"] == n - 1
    with pytest.warns(
        UserWarning, match=r"own.jsonl: 3 of \d+ positive_ids .* 'nobody' first; left"
    ):
        assert main(train) == 1
    assert "learning rates must be > 0" in capsys.readouterr().err
    write(len(questions) * [["nobody"]])
    for command in (ask, train):
        assert main(command) == 1
        assert "'nobody' first: give the ids of passages as" in capsys.readouterr().err


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
    (tmp_path / "tuned" / "system.json").unlink()
    assert main(command) == 0
    assert told(capsys)[0]["trials"] == result["trials"]
    (tmp_path / "tuned" / "system.json").unlink()
    tuned.under("Be brief.").save(tmp_path / "another")
    command[1] = str(tmp_path / "another")
    assert main(command) == 1
    assert "holds a training of others: system was" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    to = ["--to", str(tmp_path / "tuned")]
    assert main(["train", str(system), str(questions), *to, "--strategy", "poem"]) == 1
    assert "unknown strategy 'poem'; choose among ['none', 'retriever'" in capsys.readouterr().err
    bare = [json.loads(line) | {"positive_ids": []} for line in questions.read_text().splitlines()]
    questions.write_text("\n".join(map(json.dumps, bare)))
    assert main(["train", str(system), str(questions), *to, "--strategy", "retriever"]) == 1
    assert "needs gold passages" in capsys.readouterr().err
    assert main(["train", str(system), str(questions), *to, "--factors", "0"]) == 1
    assert "learning rates must be > 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--algorithm", "fedsgd"], "--algorithm: unknown algorithm 'fedsgd'; choose among ['fedavg'"),
        (["--algorithm", "fedprox", "--algorithm-options", "mu"], "'mu' is not NAME=VALUE"),
        (["--algorithm", "fedprox", "--algorithm-options", "nu=1"], "unknown options ['nu'] of fedp"),
        (["--algorithm", "fedprox", "--algorithm-options", "mu=-1"], "mu must be at least 0, got -1"),
        (["--algorithm", "fedprox", "--regime", "centralised"], "add --regime=federated"),
        (["--algorithm", "scaffold"], "give --query-rate and --adapter-rate"),
    ],
)  # fmt: skip
def test_algorithms_that_cannot_train_are_refused(options, words, tmp_path, capsys):
    to = ["--to", str(tmp_path / "tuned"), "--regime", "federated"]
    assert main(["train", "system", "own.jsonl", *to, *options]) == 1  # before either is read
    assert words in capsys.readouterr().err


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
    (tmp_path / "tuned" / "system.json").unlink()
    assert main([*command[:-1], "weighting=examples"]) == 1
    assert "holds a training of others: algorithm_options was" in capsys.readouterr().err
    assert main(command) == 0
    assert told(capsys)[0]["validation"] == result["validation"]


def test_answers_whose_ends_are_not_trained_on_are_told(system, tmp_path, capsys):
    questions = write_questions(tmp_path / "own.jsonl", system)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    long = next(i for i, row in enumerate(rows) if row["split"] == "train")
    rows[long]["answers"] = ["", "It was opened in the spring of the year after the flood. " * 2]
    questions.write_text("\n".join(map(json.dumps, rows)))
    command = ["train", str(system), str(questions), "--to", str(tmp_path / "tuned"), "--factors"]
    assert main([*command, "0"]) == 1
    said = re.search(
        r"1 of \d+ training answers are longer than 16 tokens, .* --max-answer-tokens=(\d+)",
        capsys.readouterr().err,
    )
    assert int(said[1]) > 20
    assert main([*command, "0", "--max-answer-tokens", said[1]]) == 1
    assert "training answers are longer" not in capsys.readouterr().err


# --- as it is installed ----------------------------------------------------------------------------


def test_help_is_quick_and_imports_little():
    code = (
        "import sys\nfrom fedrag_jax.cli.command_line import parser\nparser().format_help()\n"
        "assert not {'jax', 'transformers', 'faiss'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_service_answers_and_stops(system):
    command = [*FEDRAG, "serve", str(system), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    try:
        line = process.stderr.readline()
        assert line.startswith("serving fedrag at http://127.0.0.1:"), line
        address = line.split()[-1]
        body = {"messages": [{"role": "user", "content": QUESTIONS[0].question}]}
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.loads(reply.read())["choices"][0]["message"]["content"]
        assert answer == RAGSystem.load(system).query(QUESTIONS[0].question).answer
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


# --- files that cannot be read or written -----------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys):
    documents, folder = write_documents(tmp_path / "documents"), tmp_path / "system"
    command = ["index", str(documents), "--to", str(folder), "--quiet"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kilobytes in (10, 400):  # of the largest file: full while it reads, and while it saves
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, before[1]))
        try:
            assert main(command) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line and "cannot be written" in line
        assert not (folder / "system.json").exists()
    assert main(command) == 0
    assert len(RAGSystem.load(folder).store) == 60


def test_a_cache_that_cannot_be_made_is_one_line(system, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["ask", str(system), "Who?"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/file/cache cannot be made" in line


def test_two_processes_do_not_train_or_index_in_one_folder(system, tmp_path, capsys):
    code = "import pathlib, sys; from fedrag_jax.files import hold; "
    code += "held = [hold(pathlib.Path(f)) for f in sys.argv[1:]]; print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, system, tmp_path / "training"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    questions = tmp_path / "own.jsonl"
    rows = [{"id": e.id, "question": e.question, "answers": e.answers} for e in QUESTIONS[:20]]
    rows = [row | {"split": ("train", "validation")[i % 2]} for i, row in enumerate(rows)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    for command, folder in (
        (["index", str(system.parent / "documents"), "--to", str(system), "--quiet"], system),
        (["train", str(system), str(questions), "--to", str(tmp_path)], tmp_path / "training"),
    ):
        assert main(command) == 1
        assert f"{folder} is held by another process" in capsys.readouterr().err
    process.communicate(b"\n")
