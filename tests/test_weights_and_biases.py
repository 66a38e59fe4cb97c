"""Runs that are logged while there is no network, and later."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import wandb_server
from ml_collections import ConfigDict
from toy_rag import DATASET

from experiments.reporting import cells
from experiments.reporting.page import Report
from experiments.reporting.weights_and_biases import summary, tags_of
from experiments.run import Experiment, Point, run
from fedrag_jax.tracking.ledger import Cost

NOWHERE = "http://127.0.0.1:9"  # the port of a service that nobody runs
LOG = """
import pathlib, sys
from experiments.reporting import cells
from experiments.reporting.weights_and_biases import log_cell
folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
for seed in (0, 1):
    cell = cells.load(folder, "retriever", "federated", seed, seed)
    log_cell(cell, folder, "a-group", mode, "a-project", {}, rank=8)
print("done")
"""


@pytest.fixture
def folder(tmp_path):
    """Of a comparison with two finished cells."""
    record = {"round": 1, "loss": 0.5, "examples": 8, "seconds": 1.0, "metrics": {"tokens": 3.0}}
    for seed in (0, 1):
        scores = {"em": np.array([0.0, 1.0]), "nll": np.array([1.0, 2.0])}
        curves = {"ranking": [record, record | {"round": 2, "loss": 0.25, "examples": 16}]}
        about = {}, [50.0], Cost(), curves, np.arange(2)
        cell = cells.Cell("retriever", "federated", seed, seed, scores, *about)
        cells.save(tmp_path, cell)
    return tmp_path


def log(folder, mode, server):
    """What a process that logs both cells tells on standard error."""
    about = {"WANDB_BASE_URL": server, "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": "3"}
    done = subprocess.run(
        [sys.executable, "-c", LOG, folder, mode],
        env=os.environ | about,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("done\n"), done.stderr
    return [line for line in done.stderr.splitlines() if "Loaded credentials" not in line]


@pytest.mark.slow  # five processes, each with its imports
def test_what_was_logged_without_a_network_is_sent_later(folder):
    names = [f"retriever-federated-rank=8-seed{seed}" for seed in (0, 1)]
    (told,) = log(folder, "online", NOWHERE)  # given up on once, not for each cell
    assert told.startswith(f"wandb: {NOWHERE} cannot be reached") and "wandb sync" in told
    logged = json.loads((folder / "wandb.json").read_text())
    assert [*logged] == names and not any(run["sent"] for run in logged.values())
    offline = sorted(folder.glob("wandb/offline-run-*"))
    assert {p.name.rpartition("-")[2] for p in offline} == {run["id"] for run in logged.values()}
    log(folder, "offline", NOWHERE)
    assert sorted(folder.glob("wandb/offline-run-*")) == offline  # logged already
    with wandb_server.serving() as (server, runs):
        assert log(folder, "online", server) == []
        assert {i: run["name"] for i, run in runs.items()} == {
            logged[name]["id"]: name for name in names
        }
        for run in runs.values():
            assert run["complete"]
            assert [line["ranking/loss"] for line in run["history"]] == [0.5, 0.25]
        runs.clear()
        log(folder, "online", server)
        assert not runs  # sent already


def test_points_of_one_name_in_two_folders_are_both_logged(tmp_path):
    lab = types.SimpleNamespace(dataset=DATASET)

    def compute(lab, point):
        where = point.name, point.regime, point.seed, point.split
        about = {}, [50.0], Cost(), {}, np.arange(2)
        return cells.Cell(*where, {"em": np.array([0.0, 1.0])}, *about)

    experiment = Experiment(
        name="two",
        free=(),
        lab=lambda config, folder: lab,
        points=lambda lab: [Point("mined", "federated", 0, 0, folder=f) for f in ("one", "other")],
        compute=compute,
        summary=lambda cell: "",
        report=lambda config, folder: Report("two", "", []),
    )
    config = ConfigDict({"name": "two", "seeds": (0,), "split_seeds": ()})
    config.wandb = ConfigDict({"mode": "offline", "project": "tests"})
    folder = run(experiment, config, str(tmp_path))
    for name in ("one", "other"):
        assert [*json.loads((folder / name / "wandb.json").read_text())] == [
            f"mined-federated-{name}-seed0"
        ]
        assert len([*(folder / name / "wandb").glob("offline-run-*")]) == 1


def test_cells_of_one_strategy_are_told_apart_and_scores_have_their_units():
    scores = {
        "em": [0.0, 1.0], "one_hop_em": [1.0, 1.0], "loss": [-2.0, -4.0], "calibrated": [1.0, 2.0],
        "user": [3.0, 4.0], "cosine_0": [0.1, 0.2], "took_part": [1.0, 0.0],
    }  # fmt: skip
    scores = {name: np.array(values) for name, values in scores.items()}
    about = scores, {"epsilon": 8.0}, [], Cost(seconds=2.0), {}, np.arange(2)
    cell = cells.Cell("retriever", "federated", 0, 0, *about)
    names = {
        "-".join(tags_of(cell, place, {})) for place in ("flip/krum", "flip/mean", "noise/mean")
    }
    assert "retriever-federated-flip-krum-seed0" in names and len(names) == 3
    assert tags_of(cell, "points/alpha1", {"alpha": 1.0})[2:] == ["alpha=1", "seed0"]
    found = summary(cell)
    tests = {name: value for name, value in found.items() if name.startswith("test/")}
    assert tests == {
        "test/em_percent": 50.0, "test/one_hop_em_percent": 100.0, "test/loss_nats": -3.0,
        "test/calibrated_nats": 1.5,
    }  # fmt: skip
    assert found["cost/seconds"] == 2.0 and found["controls/epsilon"] == 8.0
