"""Makes, serves and joins a federation that is a folder, from a shell.

FOLDER/
  pyproject.toml, federation/   the Flower app, which `flwr run` also starts
  server/                       certificates, public keys of the parties, the trained model
  parties/NAME/                 for the party: its key, ca.crt, party.json
    documents/, questions.jsonl   generated here; a real party uses its own
    system/                       the index and models of these documents
"""

import contextlib
import importlib.resources
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.errors import ConfigError
from fedrag_jax.files import read_json, write_json, write_text
from fedrag_jax.integrations.flower import commands
from fedrag_jax.integrations.flower.certificates import (
    CA,
    make_certificates,
    make_node_key,
    require_hosts,
)
from fedrag_jax.integrations.flower.gate import open_gate
from fedrag_jax.integrations.flower.model_file import MODEL
from fedrag_jax.integrations.flower.party import FOLDER, NUMBER
from fedrag_jax.integrations.flower.party_search import SHARES
from fedrag_jax.integrations.flower.searches import ASKED, FOUND
from fedrag_jax.integrations.flower.systems import QUESTIONS, SYSTEM
from fedrag_jax.models import hub
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.registry import new_store
from fedrag_jax.systems.indexing import index

ABOUT, KEY, SERVER = "party.json", "node.key", "server.json"
ENDED = "finished:completed", "finished:failed", "finished:stopped"
LOOK = 10.0  # seconds between two checks of the run; each starts a program
NAMED = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")


def make(
    folder: pathlib.Path,
    hosts: Sequence[str],
    port: int,
    parties: Sequence[str],
    passages: int,
    seed: int,
) -> None:
    """Writes a federation whose parties hold generated documents on different topics.

    Args:
      hosts: names and addresses of the server, for its certificate; parties connect to the first.
      port: port of the server.
      parties: names of the parties.
      passages: maximum number of passages per party.
      seed: random seed of the generated world.

    Raises:
      ConfigError: a folder that is not empty, names that are invalid or repeated, more parties than the
        world has topics, or passages without a training question.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another folder")
    if len({*parties}) < len(parties) or not all(NAMED.fullmatch(name) for name in parties):
        raise ConfigError(
            f"names of parties must differ and consist of letters, digits, - and _, got {[*parties]}"
        )
    world = synthetic.generate(synthetic.WorldConfig(seed=seed))
    topics = sorted({e.topic for e in world.train})
    if not 1 <= len(parties) <= len(topics) or passages < 1:
        raise ConfigError(
            f"the generated documents are about {len(topics)} topics, at least one for each party: ask "
            f"for 1 to {len(topics)} parties with at least 1 passage, got {len(parties)} and {passages}"
        )
    require_hosts(hosts)
    held = [_held(world, topics[n :: len(parties)], passages) for n in range(len(parties))]
    for name, (_, asked) in zip(parties, held, strict=True):
        if not any(split == "train" for _, split in asked):
            raise ConfigError(
                f"{name}: no training question is about its passages; ask for more than {passages}"
            )
    _copy_project(folder, len(parties))
    certificates = folder / "server" / "certificates"
    # Also loopback: the server's own programs connect from this machine.
    make_certificates(certificates, [*dict.fromkeys([*hosts, "127.0.0.1", "localhost"])])
    write_json(folder / "server" / SERVER, {"port": port})
    for number, name in enumerate(parties):
        own = folder / "parties" / name
        make_node_key(own / KEY)
        keys = folder / "server" / "parties"
        keys.mkdir(exist_ok=True)
        shutil.copy(own / f"{KEY}.pub", keys / f"{name}.pub")
        shutil.copy(certificates / CA, own / CA)
        write_json(
            own / ABOUT, {"name": name, "number": number, "server": f"{hosts[0]}:{port}"}, indent=2
        )
        _write_documents(own, *held[number])
        index(own / "documents", own / SYSTEM, _new_system)


def serve(folder: pathlib.Path, changes: Sequence[str] = (), listen: str = "127.0.0.1") -> int:
    """Runs the server of a federation until training ends; returns its exit code.

    Args:
      changes: `key=value` of the run's configuration.
      listen: address of this machine on which the server accepts parties.

    Raises:
      ConfigError: no federation in the folder.
      FlowerError: one of Flower's programs failed.
    """
    with linked(folder, listen) as (home, link):
        run = folder / "server" / "run"
        before = _written(run / MODEL)
        _follow(run, commands.start_run(home, folder, changes), home, link, before)
    return 0


def search(
    folder: pathlib.Path,
    questions: Sequence[str],
    k: int,
    patience: int = 600,
    listen: str = "127.0.0.1",
) -> dict[str, Any]:
    """Searches the parties that share their passages; returns the content of `found.json`.

    Args:
      questions: questions with words.
      k: number of passages to find for each question.
      patience: seconds to wait until all parties are connected, and for their answers.

    Raises:
      ConfigError: a blank question, k below 1, or no patience; also as `serve`.
      FlowerError: as `serve`.
    """
    if not all(question.strip() for question in questions) or k < 1 or patience < 1:
        raise ConfigError(
            "a search needs questions with words, and at least 1 passage and 1 second of patience, got "
            f"{[*questions]}, {k} and {patience}"
        )
    where = folder / "server" / "search"
    with linked(folder, listen) as (home, link):
        where.mkdir(exist_ok=True)
        write_json(where / ASKED, [*questions])
        (where / FOUND).unlink(missing_ok=True)
        chosen = ['search="server/search"', f"top-k={k}", f"patience={patience}"]
        run = commands.start_run(home, folder, chosen)
        while commands.status(home, run) not in ENDED:
            _require_alive(link)
            time.sleep(1)
        if not (where / FOUND).exists():
            raise commands.FlowerError(f"the search failed: see {folder / 'server' / 'link.log'}")
    return read_json(where / FOUND)


def wait_for_runs(folder: pathlib.Path, listen: str = "127.0.0.1") -> int:
    """Runs a SuperLink for users who start runs with `flwr run`; returns its exit code.

    Raises:
      as `serve` does.
    """
    with linked(folder, listen) as (home, link):
        print(f"FLWR_HOME={home} flwr run {folder} {commands.LINK} --stream", flush=True)
        return link.wait()


@contextlib.contextmanager
def linked(folder: pathlib.Path, listen: str) -> Iterator[tuple[pathlib.Path, subprocess.Popen]]:
    """Runs a SuperLink that knows all parties, and a gate; yields Flower's folder and the process."""
    server = folder / "server"
    if not (folder / "pyproject.toml").exists() or not server.is_dir():
        raise ConfigError(f"{folder} is not a federation: fedrag federate init {folder}")
    home = (server / "flower").absolute()
    port = int(read_json(server / SERVER)["port"])
    inside = port + 1
    own = f"127.0.0.1:{inside}"
    commands.connect(home, own, server / "certificates" / CA)
    certificates, database = ((server / name).absolute() for name in ("certificates", "link.db"))
    command = commands.superlink(certificates, database, "127.0.0.1", inside)
    told = server / "link.log"
    how: dict[str, Any] = {"cwd": folder, "env": commands.environment(home)}
    with told.open("a") as log, commands.running(command, stdout=log, stderr=log, **how) as link:
        print(f"starting the SuperLink; its log is {told}", flush=True)
        commands.wait_for_link(home, link)
        for key in sorted((server / "parties").glob("*.pub")):
            commands.register(home, key.absolute(), key.stem)
        opened = open_gate(own, certificates, listen, port)
        print(f"parties can connect to port {port}", flush=True)
        try:
            yield home, link
        finally:
            opened.should_exit = True


def join(party: pathlib.Path, local_port: int | None = None, shares: bool = False) -> int:
    """Runs the node of a party until it is stopped; returns its exit code.

    Args:
      local_port: port of this machine for the party's own programs.
      shares: whether the party answers searches with its passages.

    Raises:
      ConfigError: the folder is not of a party, or its `party.json` lacks something.
    """
    path = party / ABOUT
    if not path.exists():
        raise ConfigError(
            f"{path} is missing: give the folder of a party that fedrag federate init made"
        )
    about: Any = read_json(path)
    known = isinstance(about, dict) and "server" in about
    if not known or type(about.get("number")) is not int:
        raise ConfigError(
            f"{path} needs the party's number and server: take the file that fedrag federate init made"
        )
    config = {NUMBER: about["number"], FOLDER: str(party.absolute()), SHARES: shares}
    port = commands.NODE_PORT + config[NUMBER] if local_port is None else local_port
    command = commands.supernode(
        about["server"], (party / CA).absolute(), (party / KEY).absolute(), config, port
    )
    environment = commands.environment((party / "flower").absolute())
    with commands.running(command, env=environment) as node:
        return node.wait()


def _written(path: pathlib.Path) -> int:
    """Returns the time when a file was written, in nanoseconds; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _follow(
    run: pathlib.Path, number: str, home: pathlib.Path, link: subprocess.Popen, before: int
) -> None:
    """Prints rounds as they end, until a model is saved that was not there before."""
    told, looked = 0, time.monotonic()
    while True:
        path = run / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[told:]:
            _tell(json.loads(line))
        told = len(lines)
        if _written(run / MODEL) != before:
            break
        _require_alive(link)
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            if commands.status(home, number) in ENDED and _written(run / MODEL) == before:
                raise commands.FlowerError(f"the run failed: see {run.parent / 'link.log'}")
        time.sleep(1)
    print(f"trained: {run / MODEL}; waiting for the parties to receive it", flush=True)
    while commands.status(home, number) not in ENDED:
        _require_alive(link)
        time.sleep(LOOK)  # the run itself waits no longer than its patience


def _require_alive(link: subprocess.Popen) -> None:
    if link.poll() is not None:
        raise commands.FlowerError(f"the SuperLink ended with {link.returncode}: see its log")


def _tell(record: dict[str, Any]) -> None:
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    bytes_each = record["bytes_down"] + record["bytes_up"]
    print(
        f"round {record['round']}/{record['rounds']}  loss {loss}  parties {record['clients']}  "
        f"{bytes_each:,} bytes  {record['seconds']:.0f} s",
        flush=True,
    )
    for client, why in record["refused"].items():
        print(f"  party {client}: {why}", file=sys.stderr, flush=True)


def _new_system() -> RAGSystem:
    """Returns a system of the built-in models, which read the generated world, over an empty store."""
    encoder = hub.load("builtin:encoder")
    return RAGSystem.build(
        store=new_store("flat", encoder.network.config.dimension),
        retriever=encoder,
        generator="builtin:decoder",
    )


def _copy_project(folder: pathlib.Path, clients: int) -> None:
    source = importlib.resources.files("fedrag_jax.integrations.flower") / "project"
    for name in ("README.md", "pyproject.toml", ".gitignore"):
        text = (source / name.removeprefix(".")).read_text(encoding="utf-8")
        text = text.replace("\nclients = 3\n", f"\nclients = {clients}\n")
        text = text.replace("\nquorum = 2 ", f"\nquorum = {clients // 2 + 1} ")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, text)
    (folder / "federation").mkdir()
    for name in ("__init__.py", "client.py", "server.py"):
        write_text(folder / "federation" / name, (source / "federation" / name).read_text())


def _held(
    world: Dataset, topics: Sequence[str], passages: int
) -> tuple[list[Passage], list[tuple[Example, str]]]:
    """Returns passages on some topics, and the questions that they answer with their splits.

    The world's validation and test questions are for testing.
    """
    of_topics: list[Passage] = [p for p in world.passages if p.topic in topics][:passages]
    ids, trained = {p.id for p in of_topics}, {*world.train}
    return of_topics, [
        (e, "train" if e in trained else "test")
        for e in [*world.train, *world.validation, *world.test]
        if e.hops == 1 and e.positive_ids and {*e.positive_ids} <= ids
    ]


def _write_documents(
    party: pathlib.Path, passages: Sequence[Passage], asked: Sequence[tuple[Example, str]]
) -> None:
    """Writes passages, one per JSON line, and questions about them."""
    (party / "documents").mkdir(parents=True)
    documents = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
    questions = [
        {"id": e.id, "question": e.question, "answers": [*e.answers],
         "positive_ids": [*e.positive_ids], "split": split}
        for e, split in asked
    ]  # fmt: skip
    for path, rows in (
        (party / "documents" / "records.jsonl", documents),
        (party / QUESTIONS, questions),
    ):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
