"""`fedrag federate` as its README says it: a server and three parties as processes, to an answer."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 3000  # seconds, on a machine that has other things to do
PARTIES = "hospital_north", "hospital_south", "library"
FEDRAG = "import sys; from fedrag_jax.cli.command_line import main; sys.exit(main(sys.argv[1:]))"


def command(*arguments) -> list[str]:
    return [sys.executable, "-c", FEDRAG, *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def fedrag(folder, *arguments) -> str:
    """What a command says that runs in a folder."""
    done = subprocess.run(
        command(*arguments),
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def two_free_ports() -> int:
    """The first of two: the gate's and, behind it, the SuperLink's."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture
def started(tmp_path):
    """`started(name, *arguments)`: a command in the background, which is gone after the test."""
    running = {}

    def start(name, *arguments):
        with (tmp_path / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(
                command(*arguments),
                stdout=log,
                stderr=log,
                env=environment(),
                cwd=tmp_path,
            )
        return running[name]

    yield start
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait(120)
    assert not left_of(tmp_path)  # whoever ends a party ends its node and what that has started


def left_of(folder: pathlib.Path) -> list[int]:
    """Flower's programs that were started for a federation and are there still."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def until(done, what, process, log):
    end = time.monotonic() + PATIENCE
    while not done():
        assert process.poll() in (None, 0), log.read_text()
        assert time.monotonic() < end, f"{what}: not in {PATIENCE} s\n{log.read_text()}"
        time.sleep(0.5)


@pytest.mark.slow
def test_three_parties_train_and_answer_from_their_own_documents(tmp_path, started):
    port = two_free_ports()
    # Relative paths, and a folder of the name that documentation gives it.
    fedrag(tmp_path, "federate", "init", "federation/", "--passages", 12, "--port", port)
    folder, about = tmp_path / "federation", tmp_path / "federation" / "parties"
    changes = "--set", "rounds=2", "local-steps=2"
    server = started("run", "federate", "run", "federation/", *changes)
    for name in PARTIES:
        local = "--local-port", two_free_ports()
        started(name, "federate", "join", f"federation/parties/{name}", *local)
    log = tmp_path / "run.log"
    until(lambda: server.poll() is not None, "the end", server, log)
    told = log.read_text()
    assert server.returncode == 0 and "round 2/2" in told and "trained: " in told, told
    records = [
        json.loads(line)
        for line in (folder / "server" / "run" / "rounds.jsonl").read_text().splitlines()
    ]
    assert [record["round"] for record in records] == [1, 2]
    assert all(record["loss"] > 0 and record["bytes_up"] > 0 for record in records)
    assert not left_of(folder / "server")

    for name in PARTIES:
        kept = about / name / "model.safetensors"
        until(kept.exists, f"the model at {name}", server, tmp_path / f"{name}.log")
    own = about / "library"
    fedrag(tmp_path, "federate", "tuned", "federation/parties/library", "--to", "tuned/")
    question = json.loads((own / "questions.jsonl").read_text().splitlines()[0])["question"]
    told = fedrag(tmp_path, "ask", "tuned/", question)
    held = {json.loads(line)["title"] for line in (own / "documents" / "records.jsonl").open()}
    assert any(title in told for title in held), told
