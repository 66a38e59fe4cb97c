"""`fedrag index`: systems follow their documents, through kills, and lose nothing that was there."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time

import matplotlib.pyplot as plt
import pytest
from documents import FEDRAG, PASSAGES, QUESTIONS, WORLD, told, write_documents
from matplotlib.backends.backend_pdf import PdfPages

from fedrag_jax.cli.command_line import main
from fedrag_jax.errors import CheckpointError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.systems import indexing
from fedrag_jax.systems.journal import Journal


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


def test_indexing_into_a_folder_of_passages_keeps_them(tmp_path, capsys):
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "Ada lives in Rome."}\n')
    assert main(["index", str(passages), "--to", str(tmp_path), "--quiet"]) == 1
    assert f"{passages} is not of a saved system and would be lost" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["passages.jsonl"]
    assert passages.read_text() == '{"text": "Ada lives in Rome."}\n'


def test_indexing_refuses_what_would_lose_something(system, tmp_path, capsys):
    documents = write_documents(tmp_path / "documents", PASSAGES[:21])
    for more, error in (
        (["--store", "hnsw"], "holds a system already, and --store apply to new systems only"),
        ([], "holds the documents of .*/documents, not of"),
        (["--moved", "--tokens", "1000000"], "encoder reads [0-9]+ tokens of a passage"),
    ):
        assert main(["index", str(documents), "--to", str(system), "--quiet", *more]) == 1
        assert re.search(error, capsys.readouterr().err)
    new = ["index", str(documents), "--to", str(tmp_path / "new"), "--quiet"]
    for more, error in (
        (["--store", "qdrant"], "store 'qdrant' needs the option 'at'"),
        (["--at", "x"], "has no option 'at'; it belongs to qdrant and postgres"),
        (["--like", str(system), "--generator", "x"], "--like takes models and prompts"),
        (["--language", "english"], "has no option 'language'; it belongs to bm25 and hybrid"),
        (["--top-k", "0"], "--top-k must be at least 1, got 0"),
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


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_call_leaves_no_settings_for_later_ones(tmp_path, capsys, there):
    documents = write_documents(tmp_path / "documents", PASSAGES[:5])
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" ")
    to = ["--to", str(tmp_path / "system"), "--quiet"]
    if there:
        assert main(["index", str(documents), *to]) == 0
    for wrong, why in (
        ([str(documents), "--tokens", "0"], "got 0 and 0"),
        ([str(documents), "--overlap", "150"], "and 150"),
        ([str(tmp_path / "blank"), "--moved"], "no words in the 1 documents"),
    ):
        assert main(["index", *wrong, *to]) == 1
        assert why in capsys.readouterr().err
        assert main(["index", str(documents), *to]) == 0
        assert "5 passages of 6 documents" in capsys.readouterr().out


def test_a_system_leaves_a_store_of_others_alone(tmp_path, capsys):
    place = ["--store", "qdrant", "--at", str(tmp_path / "qdrant"), "--quiet"]
    for name, text in (("a", "Ada lives in Rome."), ("b", "Bob lives in Oslo.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(text)
    assert main(["index", str(tmp_path / "a"), "--to", str(tmp_path / "one"), *place]) == 0
    other = ["index", str(tmp_path / "b"), "--to", str(tmp_path / "other"), *place]
    assert main(other) == 1
    assert "holds 1 foreign passages, such as 'a.txt#0'" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    ("first", "then", "alike"),
    [
        (("50", "--overlap", "0"), ("60",), "0"),
        (("50", "--overlap", "20"), ("30",), "6"),  # no room for 20
        (("50",), ("90",), "18"),
    ],
)
def test_a_chosen_overlap_stays_with_another_size(first, then, alike, tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "long.txt").write_text("Ada lives in Rome, Bob in Oslo. " * 60)

    def indexed(folder, *sizes):
        for size in sizes:
            to = ["--to", str(tmp_path / folder), "--quiet"]
            assert main(["index", str(documents), *to, "--tokens", *size]) == 0
        return [(p.id, p.text) for p in RAGSystem.load(tmp_path / folder).store.passages()]

    assert indexed("a", first, then) == indexed("b", (*then, "--overlap", alike))


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
    tuned = dataclasses.replace(tuned, searching=tuned.searching._replace(passages=2))
    tuned.save(tmp_path / "tuned")
    command = ["index", str(system.parent / "documents"), "--to", str(tmp_path / "new"), "--quiet"]
    like = ["--like", str(tmp_path / "tuned"), "--store", "bm25", "--top-k", "3"]
    assert main([*command, *like]) == 0
    loaded = RAGSystem.load(tmp_path / "new")
    assert loaded.store.kind == "bm25" and loaded.prompts.style == tuned.prompts.style
    assert loaded.top_k == 3 and not loaded.retriever.passages
    assert loaded.searching == tuned.searching
    command[3] = str(tmp_path / "untold")
    assert main([*command, *like, "--system-prompt", ""]) == 0
    assert not RAGSystem.load(tmp_path / "untold").prompts.system


def test_the_working_directory_may_be_indexed(tmp_path, capsys, monkeypatch):
    documents, folder = write_documents(tmp_path / "documents"), tmp_path / "system"
    monkeypatch.chdir(documents)
    assert main(["index", ".", "--to", str(folder), "--json", "--quiet"]) == 0
    assert told(capsys)[0]["passages"] == 60
    assert main(["index", ".", "--to", "own", "--json", "--quiet"]) == 0
    assert main(["index", ".", "--to", "own", "--json", "--quiet"]) == 0  # whose files are left out
    assert [(t["added"], t["changed"]) for t in told(capsys)] == [(60, 0), (0, 0)]
