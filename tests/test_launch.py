"""An experiment that is stopped, started twice, or finds a damaged file."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.launch import settled_config
from experiments.reporting import cells
from fedrag_jax.errors import DataError
from fedrag_jax.tracking import manifest
from fedrag_jax.tracking.ledger import Cost

ROOT = pathlib.Path(__file__).parent.parent
WAITS = """
import pathlib, signal, time
from experiments.launch import launch, settled_config

# A shell has its background jobs ignore it, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)

def run(config, runs):
    folder = pathlib.Path(runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=())
    print("at work", flush=True)
    time.sleep(60)

launch(run, "configs/compare_strategies.py")
"""


def started(tmp_path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WAITS, f"--runs={tmp_path}", "--config.name=once"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_is_refused_and_an_interrupt_is_one_line(tmp_path):
    first = started(tmp_path)
    assert first.stdout.readline() == "at work\n"
    second = started(tmp_path)
    _, told = second.communicate(timeout=30)
    assert second.returncode == 1
    assert told.startswith(f"ConfigError: {tmp_path}/once is held by another process")
    assert len(told.splitlines()) == 1
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=30)
    assert (first.returncode, told) == (130, "stopped; run the same command to resume\n")
    third = started(tmp_path)
    assert third.stdout.readline() == "at work\n"
    third.kill()
    third.communicate()


def test_a_damaged_config_is_named(tmp_path):
    config = ConfigDict({"rounds": 5})
    settled_config(config, tmp_path, ())
    (tmp_path / "config.json").write_text('{"rounds": ')
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        settled_config(config, tmp_path, ())


@pytest.mark.parametrize("name", ["cell.json", "scores.npz"])
def test_a_damaged_cell_is_computed_again(tmp_path, capsys, name):
    cell = cells.Cell(
        "none", "local", 0, 0, {"em": np.ones(99)}, {}, [50.0], Cost(), {}, np.arange(99)
    )
    cells.save(tmp_path, cell)
    assert cells.load(tmp_path, "none", "local", 0, 0).client_em == [50.0]
    path = cells.path(tmp_path, "none", "local", 0, 0) / name
    path.write_bytes(path.read_bytes()[:-40])
    assert cells.load(tmp_path, "none", "local", 0, 0) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} is damaged") and line.endswith("it is made again")


@pytest.mark.parametrize("name", ["cost.json", "tuned.safetensors"])
def test_a_damaged_training_is_done_again(tmp_path, capsys, name):
    from fedrag_jax.models import tensors
    from fedrag_jax.objectives.task import Task
    from fedrag_jax.strategies.tuner import Tuner

    folder = tmp_path / "a-task"
    folder.mkdir()
    tensors.save_arrays({"query": np.ones((4, 4), np.float32)}, folder / "tuned.safetensors")
    (folder / "cost.json").write_text(json.dumps(Cost()._asdict()))
    task = Task("a-task", {}, {}, print, list)
    tuner = Tuner(tmp_path, "centralised", [], None, None, None, 0)
    assert tuner.finished(task)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    assert not tuner.finished(task)
    assert f"{path} is damaged" in capsys.readouterr().err


COUNTS = """
import pathlib
from experiments.launch import launch

def run(config, runs):
    import jax
    print(jax.local_device_count())
    return pathlib.Path(runs)

launch(run, "configs/compare_strategies.py")
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are not given out here")
def test_a_process_with_one_core_sees_one_device(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", COUNTS, f"--runs={tmp_path}"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines()[0] == "1"


def test_the_manifest_tells_the_whole_command(monkeypatch):
    typed = ["/bin/python3", "-m", "experiments", "compare_strategies", "--config.seeds=(0, 1)"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys, "argv", ["/here/experiments/__main__.py", "--config.seeds=(0, 1)"])
    told = manifest._command()
    assert told == "python -m experiments compare_strategies '--config.seeds=(0, 1)'"
