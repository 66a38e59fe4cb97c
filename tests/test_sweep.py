"""Fits run together are the fits run one by one."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import optax
import pytest
from test_fed_lora import CLIENTS, NETWORK, chain_task, squared_error
from tiny import random_adapters
from toys import EXAMPLES, FOUR, assert_close, linear_task, mlp_task

from fedrag_jax.data.cache import remember
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.engine import scheduling
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.tracking.checkpoints import Checkpointer

RATES = 0.02, 0.1, 0.3
WAYS = scheduling.LOOP, scheduling.Way(1, 3), scheduling.Way(1, 6)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Nothing is remembered."""
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path))


def momentum(rate):
    return tunable(optax.sgd, learning_rate=rate, momentum=0.9)


def falling(rate):
    return lambda round: momentum(rate * (1 - round / 4))


def grid(optimizer=momentum, **settings):
    task = settings.pop("task", None) or mlp_task(dropout=True)
    settings = {"task": task, "data": EXAMPLES, "rounds": 4, "batch_size": 2} | settings
    points = itertools.product(RATES, (0, 1))
    return [settings | {"optimizer": optimizer(rate), "seed": seed} for rate, seed in points]


def assert_same(together, fits):
    for result, arguments in zip(together, fits, strict=True):
        alone = fit(**arguments)
        assert_close(result.trainable, alone.trainable, 1e-5)
        for one, other in zip(result.history, alone.history, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["clients"] == other["clients"]
            assert one["examples"] == other["examples"]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data": FOUR, "algorithm": fed_avg(local_steps=2)},
        {"data": FOUR, "algorithm": fed_avg(local_epochs=1, sampling=uniform(3)), "group_size": 2},
        {"data": FOUR, "algorithm": local_only(local_steps=2)},
        {"optimizer": falling},
    ],
    ids=["centralised", "fed_avg", "epochs", "local_only", "falling rates"],
)
def test_every_way_gives_what_each_fit_gives(settings, way, monkeypatch):
    fits = grid(**settings)
    monkeypatch.setattr(scheduling, "_ways", lambda count: [way])
    assert_same(sweep(fits), fits)


def remembered(tmp_path):
    return list(json.loads((tmp_path / scheduling.MEMORY).read_text()).values())


def test_the_fastest_way_is_measured_once_and_remembered(tmp_path, monkeypatch):
    took = {WAYS[1]: 0.0, WAYS[2]: 2.0}  # the loop takes what it takes
    used = []

    def dealt(self, _, rounds, way):
        if rounds[0].left:  # one that counts
            used.append(way)
        return [scheduling.run_round(a)._replace(seconds=took[way]) for a in rounds]

    monkeypatch.setattr(scheduling, "_ways", lambda count: list(WAYS))
    monkeypatch.setattr(scheduling.Scheduler, "_dealt", dealt)
    monkeypatch.setattr(scheduling, "_pays", lambda *_: True)
    sweep(grid(rounds=5, time_aggregation=True))  # whose rounds without steps teach nothing
    assert used == [WAYS[1], WAYS[2], WAYS[1], WAYS[1]]  # after a loop
    assert remembered(tmp_path) == [list(WAYS[1])]
    sweep(grid(rounds=2, time_aggregation=True))
    assert used[4:] == [WAYS[1], WAYS[1]]


def test_what_cannot_pay_is_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduling, "_ways", lambda count: list(WAYS))
    monkeypatch.setattr(scheduling.Scheduler, "_dealt", None)
    fits = grid(rounds=3)
    fit(**fits[0])  # compiled before, which is not to look as if it took no time
    sweep(fits)  # takes milliseconds, compiling took more
    assert not (tmp_path / scheduling.MEMORY).exists()


def test_what_does_not_fit_into_memory_is_run_in_a_loop(tmp_path, monkeypatch):
    tried = []

    def full(self, program, rounds, way):
        tried.append(way)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(scheduling, "_ways", lambda count: list(WAYS[:2]))
    monkeypatch.setattr(scheduling.Scheduler, "_dealt", full)
    monkeypatch.setattr(scheduling, "_pays", lambda *_: True)
    fits = grid()
    assert_same(sweep(fits), fits)
    assert remembered(tmp_path) == [list(scheduling.LOOP)] and tried == [WAYS[1]]
    # What fitted once, on another day, is forgotten when it does not.
    ((name, _),) = json.loads((tmp_path / scheduling.MEMORY).read_text()).items()
    remember(scheduling.MEMORY, name, WAYS[1])
    sweep(fits)
    assert remembered(tmp_path) == [list(scheduling.LOOP)] and tried == [WAYS[1]] * 2


def test_arrays_that_somebody_placed_are_left_where_they_are(monkeypatch):
    monkeypatch.setattr(scheduling, "_ways", lambda count: [WAYS[1]])
    monkeypatch.setattr(scheduling.Scheduler, "_dealt", None)
    task = mlp_task()
    frozen = jax.device_put(task.frozen, jax.devices()[0])  # committed
    fits = grid(task=dataclasses.replace(task, frozen=frozen), rounds=2)
    assert_same(sweep(fits), fits)


def test_a_sweep_that_was_killed_goes_on_where_each_fit_stood(tmp_path):
    class Killed(Callback):
        def round_end(self, state, record):
            if record["round"] == 3:
                raise KeyboardInterrupt

    def fits(*callbacks):
        points = enumerate(grid())
        return [
            f | {"callbacks": [Checkpointer(tmp_path / str(i), every=1 + i % 2), *callbacks]}
            for i, f in points
        ]

    with pytest.raises(KeyboardInterrupt):
        sweep(fits(Killed()))
    for result, whole in zip(sweep(fits()), grid(), strict=True):
        assert_close(result.trainable, fit(**whole).trainable, 1e-5)


def test_one_that_diverges_leaves_the_others_alone(monkeypatch):
    monkeypatch.setattr(scheduling, "_ways", lambda count: [scheduling.Way(1, count)])
    fits = grid(task=linear_task())
    fits[3]["optimizer"] = momentum(1e30)
    found = sweep(fits)
    assert isinstance(found.pop(3), DivergenceError)
    del fits[3]
    assert_same(found, fits)


def test_fits_of_other_shapes_and_losses_are_run_apart():
    fits = grid()[:2] + grid(task=linear_task())[:1] + grid(batch_size=1)[:3]
    fits[1] |= {"data": FOUR, "algorithm": scaffold(0.1, local_steps=2), "optimizer": None}
    assert_same(sweep(fits), fits)


def test_what_is_asked_at_the_start_is_found_once():
    asked, base = [], linear_task()

    def retrieve(examples, trainable):
        asked.append(len(examples))
        return np.zeros((len(examples), 1), np.int32)

    def collate(examples, retrieved):
        assert retrieved.shape == (len(examples), 1)
        return base.collate(examples, None)

    task = dataclasses.replace(base, retrieve=retrieve, collate=collate)
    fits = [{**f, "seed": 0} for f in grid(task=task, rounds=2)]
    found = sweep(fits)
    assert len(asked) == 1 + len(fits)  # once at the start, once for each model of round 2
    assert_same(found, fits)


def test_callbacks_hear_of_their_own_fit():
    heard = []

    class Ears(Callback):
        def __init__(self, name):
            self.name = name

        def round_end(self, state, record):
            heard.append((self.name, record["round"]))

    fits = [f | {"callbacks": [Ears(i)], "rounds": 2} for i, f in enumerate(grid())]
    fits = [f | {"data": FOUR, "algorithm": fed_avg(local_steps=1)} for f in fits]
    found = sweep(fits)
    assert sorted(heard) == [(i, r) for i in range(6) for r in (1, 2)]
    assert all(record["seconds"] > 0 for result in found for record in result.history)


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="rounds must be at least 1, got 0"):
        sweep(grid(rounds=0))
    assert sweep([]) == []


def test_a_changed_base_is_given_to_the_retrieval_of_a_sweep_too():
    """Beside the adapters, so that what is retrieved by is no longer of the same parts."""
    given = []

    def retrieve(examples, trainable):
        given.append({*trainable})
        return np.zeros((len(examples), 1), np.int32)

    def loss(trainable, *rest):
        return squared_error(trainable | {"other": 0.0}, *rest)

    adapters = random_adapters(NETWORK, 0)
    task = chain_task(adapters, loss)
    task = dataclasses.replace(task, trainable={"adapters": adapters}, retrieve=retrieve)
    how = {"task": task, "data": CLIENTS, "algorithm": fed_lora("flora", NETWORK, local_steps=1)}
    how |= {"rounds": 1, "batch_size": 3, "optimizer": optax.sgd(0.003)}
    (together,) = sweep([how])
    assert given == [{"adapters", "decoder"}]
    assert_close(together.trainable, fit(**how).trainable, 1e-6)
