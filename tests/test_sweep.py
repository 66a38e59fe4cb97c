"""Fits run together are the fits run one by one."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from toys import EXAMPLES, FOUR, assert_close, linear_task, mlp_task

from fedrag_jax.data.cache import recall
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated import together
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.local_only import local_only
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.federated.scaffold import scaffold
from fedrag_jax.federated.sweep import sweep

RATES = 0.02, 0.1, 0.3
WAYS = together.LOOP, together.Way(1, 3), together.Way(1, 6)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path))
    monkeypatch.setattr(together, "_tried", {})
    monkeypatch.setattr(together, "_compiling", {})


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
    monkeypatch.setattr(together, "_ways", lambda count: [way])
    assert_same(sweep(fits), fits)


def test_the_fastest_way_is_measured_once_and_remembered(monkeypatch):
    took = {WAYS[1]: 0.0, WAYS[2]: 2.0}  # the loop takes what it takes
    used = []

    def dealt(_, rounds, way):
        used.append(way)
        return [together.run_round(a)._replace(seconds=took[way]) for a in rounds]

    monkeypatch.setattr(together, "_ways", lambda count: list(WAYS))
    monkeypatch.setattr(together, "_dealt", dealt)
    monkeypatch.setattr(together, "_pays", lambda *_: True)
    sweep(grid(rounds=5))
    assert used == [WAYS[1], WAYS[2], WAYS[1], WAYS[1]]  # after a loop
    monkeypatch.setattr(together, "_tried", {})
    sweep(grid(rounds=2))
    assert used[4:] == [WAYS[1], WAYS[1]]


def test_what_cannot_pay_is_not_compiled(monkeypatch):
    monkeypatch.setattr(together, "_ways", lambda count: list(WAYS))
    monkeypatch.setattr(together, "_dealt", None)
    sweep(grid(rounds=3))  # takes milliseconds, compiling takes more
    assert [list(tried) for tried in together._tried.values()] == [[together.LOOP]]


def test_what_does_not_fit_into_memory_is_run_in_a_loop(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(together, "_ways", lambda count: list(WAYS[:2]))
    monkeypatch.setattr(together, "_dealt", full)
    monkeypatch.setattr(together, "_pays", lambda *_: True)
    fits = grid()
    assert_same(sweep(fits), fits)
    (name,) = [together._name(*key) for key in together._tried]
    assert recall(together.MEMORY, name) == list(together.LOOP)


def test_one_that_diverges_leaves_the_others_alone(monkeypatch):
    monkeypatch.setattr(together, "_ways", lambda count: [together.Way(1, count)])
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
