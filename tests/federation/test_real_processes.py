"""A SuperLink and SuperNodes as processes of their own, over TLS, with nodes that must be known."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import textwrap
import time

import numpy as np
import pytest
from parties import SETTINGS, assert_agree, plan_of, simulate
from toys import FOUR

from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.sampling import ClientSampling
from fedrag_jax.integrations.flower import commands
from fedrag_jax.integrations.flower.certificates import make_certificates, make_node_key
from fedrag_jax.integrations.flower.model_file import load_model

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 1500  # seconds for what a test waits for, on a machine that has other things to do
ROUNDS = 5

APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "toys"
version = "1.0.0"
description = "A federation of toys"
license = "Apache-2.0"
dependencies = ["flwr>=1.42"]

[tool.flwr.app]
publisher = "fedrag"

[tool.flwr.app.components]
serverapp = "toyfed.server:app"
clientapp = "toyfed.client:app"
"""
SERVER = """
import os

from parties import plan_of
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.integrations.flower.server import server_app

plan = plan_of(scaffold(0.05, local_steps=3), rounds=5)
app = server_app(plan, os.environ["TOYS_SERVER"], present=3, quorum=1, patience=900)
"""
CLIENT = """
import json
import pathlib
import time

import numpy as np
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from parties import plan_of
from toys import FOUR

from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.integrations.flower.party import client_app

honest = client_app(plan_of(scaffold(0.05, local_steps=3), rounds=5), FOUR)


def spoiled(reply, fault):
    parts = dict(reply.content.items())
    if fault == "NaN":
        parts["model"]["in"] = Array(np.full((3, 5), np.nan, np.float32))
    elif fault == "shape":
        parts["model"]["in"] = Array(np.zeros((5, 3), np.float32))
    elif fault == "stale":
        about = dict(parts["about"])
        parts["about"] = ConfigRecord(about | {"round": about["round"] - 1})
    reply.content = RecordDict(parts)
    return reply


class Faulty(ClientApp):
    def __call__(self, message, context):
        folder = pathlib.Path(context.node_config["fedrag-folder"])
        faults = json.loads((folder / "faults.json").read_text())
        round = str(message.content["order"].get("round", ""))
        fault = faults.get(round) if message.metadata.message_type == "train" else None
        if fault == "hang":
            (folder / "hangs").touch()
            time.sleep(3600)
        reply = honest(message, context)
        return spoiled(reply, fault) if fault else reply


app = Faulty()
"""


class Processes:
    """Those of a federation, and their logs."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.running = folder, {}
        self.home, self.certificates = folder / "home", folder / "certificates"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        make_certificates(self.certificates, ["127.0.0.1", "localhost"])
        commands.connect(self.home, self.address, self.certificates / "ca.crt")
        paths = ROOT, ROOT / "tests", ROOT / "tests" / "federation"
        self.environment = commands.environment(self.home) | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "TOYS_SERVER": str(folder / "server"),
        }

    def start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def link(self) -> None:
        database = self.folder / "link.db"
        self.start("link", commands.superlink(self.certificates, database, "127.0.0.1", self.port))
        commands.wait_for_link(self.home, self.running["link"], PATIENCE)

    def party(self, number: int, faults: dict, known: bool = True) -> None:
        folder = self.folder / f"party {number}"
        key = folder / "key"
        if not key.exists():
            make_node_key(key)
            (folder / "faults.json").write_text(json.dumps(faults))
            if known:
                commands.register(self.home, key.with_name("key.pub"), f"party{number}")
        config = {"partition-id": number, "fedrag-folder": str(folder)}
        ca = self.certificates / "ca.crt"
        self.start(
            f"party {number}", commands.supernode(self.address, ca, key, config, free_port())
        )

    def run(self) -> None:
        app = self.folder / "app"
        if not app.exists():
            (app / "toyfed").mkdir(parents=True)
            (app / "pyproject.toml").write_text(APP)
            for name, text in (("__init__", ""), ("server", SERVER), ("client", CLIENT)):
                (app / "toyfed" / f"{name}.py").write_text(textwrap.dedent(text))
        started = commands.flwr(self.home, "run", str(app), commands.LINK)
        assert started.returncode == 0, started.stdout + started.stderr

    def kill(self, name: str) -> None:
        """At once, with all that it has started."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def records(self) -> list[dict]:
        path = self.folder / "server" / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, done) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}"
            assert time.monotonic() < end, f"{what}: not in {PATIENCE} s; {self.records()}"
            time.sleep(0.5)

    def end(self) -> None:
        for process in self.running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for name in [*self.running]:
            try:
                self.running[name].wait(20)
            except subprocess.TimeoutExpired:
                self.kill(name)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def processes(tmp_path):
    found = Processes(tmp_path)
    yield found
    found.end()


@pytest.mark.slow
def test_faults_of_real_processes_cost_no_more_than_the_answers_that_were_lost(processes):
    # In round 2 party 1 sends NaN and party 2 a wrong shape; in round 3 party 1 sends an answer of the
    # round before, and party 2 dies.
    processes.link()
    processes.party(0, {})
    processes.party(1, {"2": "NaN", "3": "stale"})
    processes.party(2, {"2": "shape", "3": "hang"})
    processes.party(9, {}, known=False)  # whose key nobody has registered
    stranger = processes.running.pop("party 9")
    processes.run()

    processes.wait("round 1", lambda: len(processes.records()) >= 1)
    processes.party(3, {})  # late
    hangs = processes.folder / "party 2" / "hangs"
    processes.wait("party 2 at work", hangs.exists)
    processes.kill("party 2")
    processes.wait("round 3", lambda: len(processes.records()) >= 3)
    (processes.folder / "party 2" / "faults.json").write_text("{}")
    processes.party(2, {})  # comes back

    time.sleep(5)
    processes.kill("link")  # and the server with it, within round 4
    finished = len(processes.records())
    processes.link()
    processes.run()
    model = processes.folder / "server" / "model.safetensors"
    processes.wait("the end", model.exists)
    for number in range(4):
        kept = processes.folder / f"party {number}" / "model.safetensors"
        processes.wait(f"the model at party {number}", kept.exists)

    records = processes.records()
    print(*(json.dumps(record) for record in records), sep="\n")
    assert [record["round"] for record in records] == [*range(1, ROUNDS + 1)] and finished >= 3
    refused = [record["refused"] for record in records]
    assert records[0]["clients"] == [0, 1, 2] and refused[0] == {}
    assert "not finite" in refused[1]["1"]
    assert "in is float32 [5, 3] but should be float32 [3, 5]" in refused[1]["2"]
    assert records[1]["clients"] == [0]
    assert "the answer is of round 2, not 3" in refused[2]["1"]
    assert not {1, 2} & {*records[2]["clients"]} and "Node Unavailable" in refused[2]["2"]
    assert {0, 1, 2, 3} == {*records[-1]["clients"]}
    assert "9" not in {str(c) for record in records for c in record["clients"]}
    stranger.poll()
    if stranger.returncode is None:
        os.killpg(stranger.pid, signal.SIGKILL)

    # Where the same answers count, the simulator comes to the same model.
    took_part = [np.array(record["clients"]) for record in records]
    drawing = {
        str(stream(SETTINGS["seed"], "client sampling", r).bit_generator.state): clients
        for r, clients in enumerate(took_part)
    }
    sampling = ClientSampling(
        "as it was", len, lambda sizes, rng: drawing[str(rng.bit_generator.state)]
    )
    plan = plan_of(scaffold(0.05, local_steps=3), rounds=ROUNDS)
    trainable, _ = load_model(plan, processes.folder / "server")
    simulated = plan_of(scaffold(0.05, local_steps=3, sampling=sampling), rounds=ROUNDS)
    _, others = simulate(simulated)
    assert_agree(others[-2], [trainable], others[-1:])
    assert len(FOUR.clients) == 4
