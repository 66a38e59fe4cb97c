"""Files that commands cannot read or write: full disks, impossible caches, folders held by others."""

import json
import resource
import subprocess
import sys

from documents import QUESTIONS, write_documents

from fedrag_jax.cli.command_line import main
from fedrag_jax.rag import RAGSystem


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
