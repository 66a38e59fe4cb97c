"""A fit's rounds in Weights & Biases while it runs, and after it was killed and resumed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import wandb_server

from fedrag_jax.errors import ConfigError
from fedrag_jax.tracking.weights_and_biases import WandbLog, panels

FIT = """
import sys
from toys import FOUR, linear_task
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.weights_and_biases import WandbLog

folder, mode, last, every = *sys.argv[1:3], *map(int, sys.argv[3:])

class Dies(Callback):
    def round_end(self, state, record):
        if state.round == last:
            raise SystemExit(3)

log = WandbLog(folder, "a-project", mode, {"rounds": 3})
callbacks = [Checkpointer(folder + "/checkpoints", every), log, Dies()]
fit(linear_task(), FOUR, fed_avg(local_steps=2), rounds=2 + every, seed=1, callbacks=callbacks)
"""
NOWHERE = "http://127.0.0.1:9"  # the port of a service that nobody runs


def run(folder, mode, last=0, server=NOWHERE, patience="30", every=1) -> str:
    """What a process that trains, until it dies after round `last`, says on standard error."""
    about = {"WANDB_BASE_URL": server, "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": patience}
    path = os.pathsep.join([*sys.path, str(pathlib.Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", FIT, str(folder), mode, str(last), str(every)],
        env=os.environ | about | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == (3 if last else 0), done.stderr
    return done.stderr


@pytest.mark.slow  # processes, each with its imports
def test_rounds_arrive_as_they_end_and_a_resumed_fit_continues_its_run(tmp_path):
    with wandb_server.serving() as (address, runs):
        run(tmp_path, "online", 2, address)
        run(tmp_path, "online", 0, address)
        ((own, found),) = runs.items()
    assert json.loads((tmp_path / "wandb.json").read_text()) == {
        "id": own, "online": True, "round": 3
    }  # fmt: skip
    assert [line["round"] for line in found["history"]] == [1, 2, 3] and found["complete"]
    last = found["history"][-1]
    assert last["linear/clients_answered"] == last["linear/clients_drawn"] == 4
    assert last["linear/bytes_up"] == last["linear/bytes_down"] > 0
    assert last["linear/loss"] > 0 and last["linear/examples_seen"] > 0


@pytest.mark.slow
def test_rounds_after_the_last_checkpoint_are_not_logged_twice(tmp_path):
    with wandb_server.serving() as (address, runs):
        run(tmp_path, "online", 3, address, every=2)
        run(tmp_path, "online", 0, address, every=2)
        (found,) = runs.values()
    assert [line["round"] for line in found["history"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_without_a_server_a_run_is_kept_for_later_and_sent_once_there_is_one(tmp_path):
    told = run(tmp_path, "online", last=2, patience="3")
    assert "logging offline. `wandb sync` uploads the run later" in told
    assert len([*(tmp_path / "wandb").glob("offline-run-*")]) == 1
    with wandb_server.serving() as (address, runs):
        run(tmp_path, "online", 0, address)
        (found,) = runs.values()
    assert [line["round"] for line in found["history"]] == [
        1,
        2,
        3,
    ]  # all of them, in a run of its own


def test_panels_have_the_names_that_a_comparison_uses():
    record = {
        "round": 2, "loss": 0.5, "seconds": 1.0, "examples": 8, "clients": [0, 3], "drawn": 3,
        "refused": {"1": "gone"}, "bytes_up": 7, "metrics": {"tokens": 3.0, "x": None},
    }  # fmt: skip
    assert panels("t", record) == {
        "round": 2, "t/loss": 0.5, "t/seconds_per_round": 1.0, "t/examples_seen": 8,
        "t/clients_answered": 2, "t/clients_drawn": 3, "t/clients_refused": 1, "t/bytes_up": 7,
        "t/tokens_per_example": 3.0,
    }  # fmt: skip


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"one of .*'offline', 'disabled'.*got 'on'"):
        WandbLog(tmp_path, "a-project", "on")
