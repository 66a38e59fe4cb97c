"""Time of a round and memory of the server, for many parties and one SuperLink.

    python -m experiments.benchmarks.federation_load --clients=10,50,100 --mib=1

Needs the extra `flower`. The SuperLink and the ServerApp are processes, as in a federation, but without
TLS. Each party has its own node and its own connection to the SuperLink over loopback, and runs the
ClientApp of `client_app`; four threads of this process serve them in turn. Flower would start a process
for every message of a party; that is left out. All parties average one vector, each towards a number of
its own.

Prints one line of JSON. For each number of clients it has the seconds of every round, the bytes that
went through, the answers that counted, and the peak memory of the ServerApp and of the SuperLink.
MiB are 2^20 bytes.
"""

import contextlib
import json
import logging
import os
import pathlib
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
from absl import app, flags

from experiments.benchmarks.process_memory import peak

_CLIENTS = flags.DEFINE_list(
    "clients", ["10", "50", "100"], "numbers of parties, one after another"
)
_MIB = flags.DEFINE_float("mib", 1.0, "MiB of the model", lower_bound=0.001)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "rounds of each federation", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer("heartbeat", 30, "seconds between heartbeats, as of a SuperNode")
_PATIENCE = flags.DEFINE_float("patience", 1800.0, "maximum seconds of one federation")

MIB = 2**20
PAUSE_S = 3.0  # between two requests of a party without a message, as of a SuperNode
THREADS = 4  # that serve all parties
PROJECT = """
[project]
name = "load"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedrag"

[tool.flwr.app.components]
serverapp = "load.app:server"
clientapp = "load.app:client"
"""
APP = """
from flwr.clientapp import ClientApp
from experiments.benchmarks.federation_load import plan_of
from fedrag_jax.integrations.flower.server import server_app

server = server_app(plan_of{plan}, {folder!r}, patience=600)
client = ClientApp()
"""


def main(argv):
    del argv  # what is left of it without flags
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request otherwise
    found = []
    for clients in map(int, _CLIENTS.value):
        with tempfile.TemporaryDirectory() as name:
            found.append(measured(pathlib.Path(name), clients, _MIB.value, _ROUNDS.value))
        print(found[-1], file=sys.stderr, flush=True)
    about = {
        "model_MiB": _MIB.value,
        "heartbeat_seconds": _HEARTBEAT.value,
        "cores": os.cpu_count(),
    }
    print(json.dumps(about | {"federations": found}), flush=True)


def plan_of(clients: int, mib: float, rounds: int):
    """Averaging of one vector, which each party moves towards a number of its own."""
    import jax.numpy as jnp
    import optax

    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.integrations.flower.plan import Plan
    from fedrag_jax.objectives.task import Task

    def loss(trainable, frozen, batch, rng):
        error = ((trainable["w"][None] - batch["y"][:, None]) ** 2).sum(1)
        return (batch["weight"] * error).sum() / batch["weight"].sum(), {}

    start = {"w": np.zeros(int(mib * MIB / 4), np.float32)}
    task = Task("load", start, {}, loss, lambda rows, _: {"y": jnp.array(rows, jnp.float32)})
    algorithm = fed_avg(local_steps=1)
    return Plan(task, algorithm, clients, rounds, batch_size=1, optimizer=optax.sgd(0.1))


def measured(folder: pathlib.Path, clients: int, mib: float, rounds: int) -> dict:
    """Runs one federation until every party has the last model."""
    from fedrag_jax.integrations.flower import commands
    from fedrag_jax.integrations.flower.model_file import MODEL
    from fedrag_jax.integrations.flower.party import client_app

    client = client_app(
        plan_of(clients, mib, rounds), lambda context: [float(context.node_config["partition-id"])]
    )
    server, home = folder / "server", folder / "home"
    project = written(folder / "app", APP.format(plan=(clients, mib, rounds), folder=str(server)))
    with link_of(folder, home) as (link, address), attending(address, client, clients):
        began, peaks = time.perf_counter(), {"superlink": 0.0, "serverapp": 0.0}
        started = commands.flwr(home, "run", str(project), commands.LINK)
        if started.returncode:
            raise SystemExit(started.stderr or started.stdout)
        while True:
            now = peaks_of(home)
            peaks = {name: max(old, now.get(name, 0.0)) for name, old in peaks.items()}
            if (server / MODEL).exists() and "serverapp" not in now:
                break
            if time.perf_counter() - began > _PATIENCE.value or link.poll() is not None:
                raise SystemExit((folder / "link.log").read_text()[-2000:])
            time.sleep(0.2)
        seconds = time.perf_counter() - began
    records = [json.loads(line) for line in (server / "rounds.jsonl").read_text().splitlines()]
    return {
        "clients": clients,
        "answered": [len(record["clients"]) for record in records],
        "round_seconds": [round(record["seconds"], 1) for record in records],
        "all_seconds": round(seconds, 1),
        "through_MiB": round(sum(r["bytes_up"] + r["bytes_down"] for r in records) / MIB, 1),
        "server_MiB": peaks["serverapp"],
        "superlink_MiB": peaks["superlink"],
    }


def written(project: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a Flower app; returns its folder."""
    files = {"pyproject.toml": PROJECT, "load/app.py": text, "load/__init__.py": ""}
    (project / "load").mkdir(parents=True)
    for name, content in files.items():
        (project / name).write_text(content)
    return project


@contextlib.contextmanager
def link_of(folder: pathlib.Path, home: pathlib.Path) -> Iterator[tuple]:
    """A SuperLink: its process and address."""
    from fedrag_jax.integrations.flower import commands

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        host, port = found.getsockname()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.{commands.LINK}]\naddress = "{host}:{port}"\ninsecure = true\n'
    )
    environment = commands.environment(home)
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [commands.program("flower-superlink"), "--insecure", "--host", host]
    command += ["--port", str(port), "--database", str(folder / "link.db")]
    command += ["--disable-runtime-dependency-installation"]
    with (
        (folder / "link.log").open("w") as log,
        commands.running(command, stdout=log, stderr=log, env=environment) as link,
    ):
        commands.wait_for_link(home, link)
        yield link, f"{host}:{port}"


@contextlib.contextmanager
def attending(address: str, client, clients: int) -> Iterator[None]:
    """Runs the parties until the block ends; a few threads share their connections."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    for module in (heartbeat, fleet_http_connection):
        module.HEARTBEAT_DEFAULT_INTERVAL = _HEARTBEAT.value
    stop, parties = threading.Event(), queue.SimpleQueue()
    with contextlib.ExitStack() as connections:
        for number in range(clients):
            connected = fleet_http_connection.http_request_response(address, insecure=True)
            parties.put((0.0, number, connections.enter_context(connected)))
        threads = [
            threading.Thread(target=attend, args=(client, parties, stop), daemon=True)
            for _ in range(min(clients, THREADS))
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def attend(client, parties: queue.SimpleQueue, stop: threading.Event) -> None:
    """Asks for messages of one party after the other, and answers them, until it is stopped."""
    while not stop.is_set():
        due, number, connection = parties.get()
        stop.wait(max(due - time.monotonic(), 0))
        try:
            busy = answered(client, number, connection)
        except httpx.HTTPError as error:  # what a SuperNode would do: ask again later
            busy = print(f"party {number}: {error}", file=sys.stderr, flush=True)
        parties.put((time.monotonic() + (0 if busy else PAUSE_S), number, connection))


def answered(client, number: int, connection) -> bool:
    """Takes one message of a party from the SuperLink and answers it; returns whether there was one."""
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.inflatable.inflatable_utils import (
        pull_and_inflate_object_from_tree,
        push_objects,
    )

    node, receive, send, _, _, pull, push, confirm = connection
    found = receive()
    if found is None:
        return False
    asked, tree = found
    run = asked.metadata.run_id
    message = pull_and_inflate_object_from_tree(
        tree, lambda one: pull(run, one), lambda one: confirm(run, one), return_type=Message
    )
    message.metadata.__dict__["_message_id"] = asked.metadata.message_id
    reply = client(message, Context(run, node, {"partition-id": number}, RecordDict(), {}))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    wanted, session = send(reply, get_object_tree(reply), 0.0)
    push_objects(
        get_all_nested_objects(reply),
        lambda one, content: push(run, session, one, content),
        object_ids_to_push=wanted,
    )
    return True


def peaks_of(home: pathlib.Path) -> dict[str, float]:
    """MiB that Flower's programs of this home have had at most, by the end of their name."""
    found: dict[str, float] = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if f"FLWR_HOME={home}".encode() not in (process / "environ").read_bytes():
                continue
            words = (process / "cmdline").read_bytes().decode().split("\0")
            names = {pathlib.Path(word).name.rpartition("-")[2] for word in words[:2]}
            for name in names & {"superlink", "serverapp"}:
                found[name] = max(found.get(name, 0.0), round(peak(process.name) / 2**20, 1))
    return found


if __name__ == "__main__":
    app.run(main)
