import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import Keep
from toys import assert_equal, collate, linear_task, make_examples, squared_error

import fedrag_jax
from fedrag_jax.data.partition import partition
from fedrag_jax.data.schemes import iid
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.dp_fed_avg import dp_fed_avg
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
from fedrag_jax.federated.algorithms.fed_opt import fed_adam
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.callbacks import Callback, FitState
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.coordinates import median
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.logs import JsonlLog, Progress

DATA = partition(make_examples(), iid(5))
ADAM, SGD = optax.adam(0.05), optax.sgd(0.1)


def retrieve(examples, trainable):
    return np.array([[round(1000 * float(trainable["w"][0])) + e["id"]] for e in examples])


def collate_retrieved(examples, retrieved):
    table = collate(examples, None)
    return table | {"y": table["y"] + retrieved[:, 0].astype(np.float32) / 1000}


def run(folder: Path, rounds: int = 3, callbacks=None, **changes):
    """All there is to save: client and server optimizers, retrieval of an older round."""
    task = linear_task(retrieve=retrieve, collate=collate_retrieved, **changes)
    algorithm = fed_avg(
        local_steps=2, sampling=uniform(3), carry_optimizer=True, server_optimizer=ADAM
    )
    if callbacks is None:
        callbacks = [Checkpointer(folder / "checkpoints"), JsonlLog(folder / "log.jsonl")]
    return fit(
        task, DATA, algorithm, rounds=rounds, batch_size=3, refresh_every=2, callbacks=callbacks
    )


def log_without_times(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in records]


# --- SIGKILL -----------------------------------------------------------------------------------


class Kill(Callback):
    def __init__(self, round):
        self.round = round

    def round_end(self, state, record):
        if state.round == self.round:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder: Path, round: int, place: str):
    """Dies in a round before it is saved, once it is saved but not yet logged, or after both."""
    callbacks = [Checkpointer(folder / "checkpoints"), JsonlLog(folder / "log.jsonl")]
    callbacks.insert(["unsaved", "unlogged", "logged"].index(place), Kill(round))
    run(folder, callbacks=callbacks)


DEATHS = [(1, "logged"), (2, "logged"), (3, "logged"), (2, "unsaved"), (2, "unlogged")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders left behind by processes killed in different places."""
    root = Path(fedrag_jax.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    folders, processes = {}, []
    for round, place in DEATHS:
        folders[round, place] = folder = tmp_path_factory.mktemp(f"{place}{round}")
        command = [sys.executable, __file__, str(folder), str(round), place]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=600) for process in processes] == [-signal.SIGKILL] * len(DEATHS)
    return folders


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder), log_without_times(folder)


@pytest.mark.parametrize(("round", "place"), DEATHS)
def test_a_killed_run_resumes_bit_identical(killed, uninterrupted, round, place):
    folder = killed[round, place]
    saved = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    last = round - (place == "unsaved")
    assert saved == list(range(1, last + 1))[-2:]
    before = (folder / "log.jsonl").read_text().splitlines()
    assert len(before) == round - (place != "logged")
    result = run(folder)
    assert_equal(result.trainable, uninterrupted[0].trainable)
    assert log_without_times(folder) == uninterrupted[1]
    assert [record["round"] for record in result.history] == [1, 2, 3]
    kept = [record["seconds"] for record in result.history[: len(before)]][:last]
    assert kept == [json.loads(line)["seconds"] for line in before][:last]  # not run again


# --- in one process ----------------------------------------------------------------------------


def test_personal_models_of_any_type_resume(tmp_path):
    trainable = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros((), jnp.float16)}

    def go(rounds, *callbacks):
        task = linear_task(trainable=trainable)
        settings = {"rounds": rounds, "optimizer": optax.adamw(0.1), "callbacks": callbacks}
        return fit(task, DATA, local_only(local_steps=2), **settings).trainable

    go(2, Checkpointer(tmp_path))
    resumed, straight = go(4, Checkpointer(tmp_path)), go(4)
    assert_equal(resumed, straight)
    assert resumed["w"].dtype == jnp.bfloat16 and resumed["w"].shape == (5, 3)


MOMENTUM = {"server_optimizer": optax.sgd(0.1, momentum=0.9), "local_steps": 2}


@pytest.mark.parametrize(
    "algorithm",
    [
        fed_avg_m(local_steps=2),
        fed_adam(local_steps=2),
        scaffold(0.05, local_steps=2),
        robust(median(), **MOMENTUM),
        dp_fed_avg(**MOMENTUM),
    ],
    ids=lambda algorithm: algorithm.name.partition("(")[0],
)
def test_half_precision_models_have_servers_of_single(algorithm, tmp_path):
    """One program for all rounds, sums that do not stall, and a state that can be resumed."""
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), linear_task().trainable)
    keep = Keep()
    task = linear_task(trainable=start)
    optimizer = None if algorithm.optimizer is not None else optax.adam(1e-2)

    def go(rounds, *callbacks):
        how = {"batch_size": 3, "optimizer": optimizer, "callbacks": callbacks}
        return fit(task, DATA, algorithm, rounds=rounds, **how)

    whole = go(3, keep)
    assert whole.trainable["w"].dtype == jnp.bfloat16
    kept = jax.tree.leaves((keep.state.server, keep.state.population))
    assert {x.dtype for x in kept if x.size} == {np.dtype("float32")}
    go(2, Checkpointer(tmp_path))
    assert_equal(go(3, Checkpointer(tmp_path)).trainable, whole.trainable)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    lines = log_without_times(tmp_path)
    again = run(tmp_path)
    assert_equal(again.trainable, first.trainable)
    assert again.history == first.history
    assert log_without_times(tmp_path) == lines


def test_every_and_keep(tmp_path):
    run(tmp_path, rounds=7, callbacks=[Checkpointer(tmp_path, every=2, keep=3)])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6", "7"]


def test_divergence_leaves_the_last_good_checkpoint(tmp_path):
    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        return jnp.where(batch["y"].max() > 900, jnp.nan, value), metrics

    # The retrieval before round 3 brings a target that the loss cannot bear.
    def poisoned(examples, retrieved):
        moved = abs(int(retrieved[0, 0]) - examples[0]["id"] - 500) > 0
        return collate(examples, None) | {"y": np.full(len(examples), 1000.0 * moved, np.float32)}

    task = linear_task(retrieve=retrieve, collate=poisoned, loss=loss)
    for _ in range(2):  # the second run starts at round 2 and meets the same end
        callbacks = [Checkpointer(tmp_path / "checkpoints"), JsonlLog(tmp_path / "log.jsonl")]
        with pytest.raises(DivergenceError, match=r"round 3: .*client\(s\): 0, 1, 2, 3, 4\. "):
            fit(
                task,
                DATA,
                fed_avg(local_steps=1),
                refresh_every=2,
                optimizer=SGD,
                callbacks=callbacks,
            )
        assert [record["round"] for record in log_without_times(tmp_path)] == [1, 2]
        assert not (tmp_path / "checkpoints" / "3").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 2}, "group_size was 1, is 2"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
        ({"refresh_every": 3}, "refresh_every was 1, is 3"),
        ({"algorithm": fed_avg(local_steps=3)}, r"local_steps=2.*, is fed_avg.*local_steps=3"),
        ({"data": partition(make_examples(), iid(5), seed=1)}, "clients was 5:"),
        ({"task": linear_task(name="other")}, "task was linear, is other"),
        (
            {"task": linear_task(trainable={"w": np.ones(3), "b": np.ones(1)})},
            r"arrays: state.trainable.b was \[\[\], 'float32'\], is \[\[1\], 'float32'\]",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
    settings = {
        "task": linear_task(),
        "data": DATA,
        "algorithm": fed_avg(local_steps=2),
        "rounds": 1,
    }
    fit(**settings, callbacks=[Checkpointer(tmp_path)])
    with pytest.raises(ConfigError, match=words):
        fit(**settings | changes, callbacks=[Checkpointer(tmp_path)])


def test_counts_below_one_are_refused(tmp_path):
    for settings in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            Checkpointer(tmp_path, **settings)


def test_a_log_without_checkpoints_starts_anew(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    for _ in range(2):
        result = fit(
            linear_task(), DATA, fed_avg(local_steps=2), rounds=2, callbacks=[JsonlLog(path)]
        )
        assert [json.loads(line) for line in path.read_text().splitlines()] == result.history


def test_a_first_round_that_takes_long_is_told(capsys):
    progress = Progress("seed 3", patience=0.2)
    state = FitState(0, None, None, (), {"task": "joint"})
    progress.start(state)
    time.sleep(0.6)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("seed 3, joint: no round is done after 0.2 s; ")
    progress.start(state)
    record = {"round": 1, "rounds": 1, "loss": 1.0, "seconds": 0.0, "refresh_seconds": 0.0}
    progress.round_end(state, record)
    time.sleep(0.6)
    assert "no round" not in capsys.readouterr().err


def test_a_fit_that_has_ended_waits_for_no_round(tmp_path, capsys):
    run(tmp_path, callbacks=[])  # compiles, which takes longer on a busy machine
    for _ in range(2):
        run(tmp_path, callbacks=[Checkpointer(tmp_path), Progress(patience=1.0)])
    time.sleep(1.3)
    assert "no round" not in capsys.readouterr().err


def test_progress_tells_round_and_time_left(capsys):
    progress = Progress("seed 3", patience=600)
    state = fit(linear_task(), DATA, fed_avg(local_steps=2), rounds=2, callbacks=[progress])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 2
    assert lines[1].startswith(f"seed 3, linear: round 2/2  loss {state.history[1]['loss']:.4f}  ")
    assert lines[1].endswith(" s/round  0:00:00 left")
    # 3,725 s a round, one round to go; a second line within a second is left out.
    progress.ends, progress.shown = [], 0.0
    record = state.history[0] | {"seconds": 3700.0, "refresh_seconds": 25.0}
    now = FitState(1, None, None, (record,), {"task": "linear"})
    progress.round_end(now, record)
    progress.round_end(now, record)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith("  3725.00 s/round  1:02:05 left")
    # Fits of a sweep are told their share of the time; what counts is when rounds end.
    progress.ends, progress.shown = [time.perf_counter() - 40], 0.0
    progress.round_end(now, record | {"seconds": 0.1, "refresh_seconds": 0.0})
    assert capsys.readouterr().err.endswith("  40.00 s/round  0:00:40 left\n")


if __name__ == "__main__":
    run_and_die(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])


# --- files and other processes -----------------------------------------------------------------


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken_up(tmp_path, capsys):
    whole = run(tmp_path)
    saved = tmp_path / "checkpoints"
    manifest = saved / "3" / "arrays" / "manifest.ocdbt"
    os.truncate(manifest, manifest.stat().st_size // 2)
    again = run(tmp_path)
    assert f"{saved}/3 cannot be read" in capsys.readouterr().err
    assert_equal(again.trainable, whole.trainable)
    assert len(log_without_times(tmp_path)) == 3
    assert {"2", "3", "3.damaged"} <= {p.name for p in saved.iterdir()}


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))  # fails as a full disk does
        with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written .*File too large"):
            run(tmp_path, callbacks=[Checkpointer(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "1").exists()  # or it would be taken for a checkpoint


def test_two_processes_do_not_save_one_fit(tmp_path):
    code = "import pathlib, sys; from fedrag_jax.files import hold; "
    code += "held = hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"{tmp_path} is held by another process"):
        run(tmp_path, callbacks=[Checkpointer(tmp_path)])
    process.communicate()
    run(tmp_path, callbacks=[Checkpointer(tmp_path)])
