import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import (
    EXAMPLES,
    FOUR,
    CountedLoss,
    assert_close,
    assert_equal,
    collate,
    leaves,
    linear_task,
    squared_error,
)

from fedrag_jax.errors import ConfigError, DataError, DivergenceError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.engine.cohort import sample_cohort
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.tracking.checkpoints import Checkpointer

FED_AVG = fed_avg(local_steps=2)

# --- one program per shape ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_shape_is_traced_once_and_learning_rates_share_it():
    loss = CountedLoss(squared_error)
    start = {"w": np.ones(3), "b": 0.25}  # a bare float must not make a second program

    def go(algorithm=FED_AVG, loss=loss, **settings):
        task = linear_task(trainable=start, loss=loss)
        return fit(task, FOUR, algorithm, **{"batch_size": 2, "rounds": 2} | settings)

    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    for seed in range(3):
        result = go(optimizer=optimizer, seed=seed)
    assert loss.traces == 1
    assert result.history[0]["compile_seconds"] < 0.05
    go(local_only(local_steps=2), optimizer=optimizer)
    assert loss.traces == 2
    grid = [tunable(optax.adam, learning_rate=rate) for rate in (0.1, 0.2)]
    ends = [go(optimizer=point) for point in grid]
    assert loss.traces == 3
    fixed = go(loss=squared_error, optimizer=optax.adam(0.2))
    assert_close(ends[1].trainable, fixed.trainable, 1e-5)
    assert np.abs(leaves(ends[0].trainable) - leaves(ends[1].trainable)).max() > 1e-3
    go(optimizer=optimizer, batch_size=1)
    assert loss.traces == 4


def test_local_work_draws_by_all_bits_of_a_seed():
    def loss(trainable, frozen, batch, rng):
        return 0 * trainable["b"], {"drawn": jax.random.uniform(rng)}

    def drawn(seed):
        how = {"rounds": 1, "optimizer": optax.sgd(0.1), "seed": seed}
        return fit(linear_task(loss=loss), EXAMPLES, **how).history[0]["metrics"]["drawn"]

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in (1, 1 + 2**32, 1 + 2**33)}) == 3


def test_fits_on_more_and_fewer_examples_share_a_program_over_tables_of_one_height():
    for height, traces in ((0, 2), (8, 1)):
        loss = CountedLoss(squared_error)
        ends = [
            fit(linear_task(loss=loss), EXAMPLES[:count], table_rows=height, rounds=2, batch_size=2)
            for count in (5, 8)
        ]
        assert loss.traces == traces
        for end, count in zip(ends, (5, 8), strict=True):
            plain = fit(linear_task(), EXAMPLES[:count], rounds=2, batch_size=2)
            assert_equal(end.trainable, plain.trainable)


def test_compiling_is_told_apart_from_training():
    slow = 0.3

    def loss(*arguments):
        time.sleep(slow)  # while the loss is traced, once
        return squared_error(*arguments)

    first, *later = fit(linear_task(loss=loss), FOUR, fed_avg(local_steps=2), rounds=3).history
    assert first["compile_seconds"] > slow > first["seconds"] + first["refresh_seconds"]
    assert max(record["compile_seconds"] for record in later) < slow


def test_what_is_no_local_step_is_told_apart():
    slow, steps = 0.2, fed_avg(local_steps=2)

    def wait(x, seconds):
        def waited(x):
            time.sleep(seconds)
            return x

        return jax.pure_callback(waited, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        return value, metrics | {"waited": wait(batch["weight"].sum(), slow / 8)}  # of 4 x 2 steps

    def turn(state, cohort, client):
        state, report = steps.turns[0](state, cohort, client)
        trainable = jax.tree.map(lambda x: wait(x, slow / 2), state.trainable)  # two leaves
        return state._replace(trainable=trainable), report

    plain = fit(linear_task(), FOUR, steps, rounds=2)
    for task, algorithm, low, high in (
        (linear_task(loss=loss), steps, 0, slow / 2),
        (linear_task(), steps._replace(turns=(turn,)), slow, 2 * slow),
    ):
        found = fit(task, FOUR, algorithm, rounds=2, time_aggregation=True)
        assert_equal(found.trainable, plain.trainable)
        assert {record["aggregate_seconds"] for record in plain.history} == {0.0}
        for record in found.history:
            assert low <= record["aggregate_seconds"] < high
            assert record["seconds"] >= max(slow, record["aggregate_seconds"])


def test_a_round_takes_as_much_memory_as_its_arrays_and_more():
    wide = {"w": np.zeros(3), "b": np.zeros(()), "unused": np.zeros(250_000, np.float32)}
    (record,) = fit(linear_task(trainable=wide), FOUR, fed_avg(local_steps=1), rounds=1).history
    assert 4e6 < record["peak_bytes"] < 20e6  # the model, its two moments, a gradient


def test_the_task_survives_the_fit():
    task = linear_task(trainable={"w": jnp.ones(3), "b": jnp.zeros(())})
    for algorithm in (fed_avg(local_steps=1), local_only(local_steps=1)):
        fit(task, FOUR, algorithm, rounds=2)
    assert_equal(task.trainable, {"w": np.ones(3), "b": np.zeros(())})


# --- between rounds ----------------------------------------------------------------------------


class Keep(Callback):
    def __init__(self):
        self.states, self.records = [], []

    def round_end(self, state, record):
        self.states.append(jax.tree.map(np.array, state.state))
        self.settings = state.settings
        self.records.append(record)


class StartFrom(Callback):
    """Continues after the first rounds of another fit."""

    def __init__(self, keep, rounds):
        self.keep, self.rounds = keep, rounds

    def start(self, state):
        if self.rounds == 0:
            return state
        done = jax.tree.map(np.array, self.keep.states[self.rounds - 1])
        return dataclasses.replace(state, round=self.rounds, state=done)


def retrieving_task(calls):
    def retrieve(examples, trainable):
        calls.append(([e["id"] for e in examples], float(trainable["w"])))
        return np.array([[e["id"], len(calls)] for e in examples], np.int32)

    def collate_retrieved(examples, retrieved):
        assert [e["id"] for e in examples] == retrieved[:, 0].tolist()
        return {"step": retrieved[:, 1].astype(np.float32)}

    def loss(trainable, frozen, batch, rng):
        mean = (batch["step"] * batch["weight"]).sum() / batch["weight"].sum()
        return trainable["w"] * mean, {}

    return linear_task(
        trainable={"w": np.zeros(())}, loss=loss, collate=collate_retrieved, retrieve=retrieve
    )


def test_retrieval_is_asked_again_with_what_has_been_trained():
    calls = []
    settings = {"rounds": 5, "optimizer": optax.sgd(1.0), "refresh_every": 2}
    result = fit(retrieving_task(calls), FOUR, fed_avg(local_steps=1), **settings)
    # Each round moves w by minus the number of the retrieval it trains on: 1 1 2 2 3.
    assert calls == [(list(range(23)), 0), (list(range(23)), -2), (list(range(23)), -6)]
    assert float(result.trainable["w"]) == -9


@pytest.mark.parametrize(
    "algorithm", [fed_avg(local_steps=1), local_only(local_steps=1)], ids=lambda a: a.name
)
def test_only_examples_in_use_are_retrieved_for(algorithm):
    """Four clients, two steps' worth of two examples each: 16 of 23, and the same training."""
    asked = []

    def retrieve(examples, trainable):
        asked.append({e["id"] for e in examples})
        return np.array([[e["id"]] for e in examples], np.int32)

    def collate_retrieved(examples, retrieved):
        assert len(examples) == len({e["id"] for e in examples}) <= 16
        return collate([examples_by_id[row] for row in retrieved[:, 0]], None)

    examples_by_id = {e["id"]: e for e in FOUR.examples}
    settings = {"rounds": 4, "batch_size": 2, "refresh_every": 2, "optimizer": optax.sgd(0.1)}
    found = fit(
        linear_task(retrieve=retrieve, collate=collate_retrieved), FOUR, algorithm, **settings
    )
    expected = fit(linear_task(), FOUR, algorithm, **settings)
    assert_equal(found.trainable, expected.trainable)
    assert len(set.union(*asked)) > 16 >= max(map(len, asked))


def test_local_only_retrieves_for_each_client_with_its_own_model():
    calls = []
    fit(retrieving_task(calls), FOUR, local_only(local_steps=1), rounds=2, optimizer=optax.sgd(1.0))
    ids = [sorted(rows.tolist()) for rows in FOUR.clients]
    assert [c[0] for c in calls] == ids + ids
    # Client c trained on retrieval number c + 1.
    assert [c[1] for c in calls] == [0, 0, 0, 0, -1, -2, -3, -4]


def test_a_schedule_gives_each_round_its_optimizer_and_one_program():
    """Falling rates over three rounds are three fits of one round, each with its rate."""
    loss = CountedLoss(squared_error)

    def falling(round):
        return tunable(optax.sgd, learning_rate=0.1 * (1 - round / 3))

    keep = Keep()
    settings = {"rounds": 3, "optimizer": falling, "callbacks": [keep], "batch_size": 2}
    fit(linear_task(loss=loss), FOUR, fed_avg(local_steps=2), **settings)
    assert loss.traces == 1
    for round, rate in enumerate((0.1, 0.2 / 3, 0.1 / 3)):
        constant = Keep()
        settings = {"rounds": round + 1, "callbacks": [StartFrom(keep, round), constant]}
        settings["batch_size"] = 2
        fit(linear_task(), FOUR, fed_avg(local_steps=2), optimizer=optax.sgd(rate), **settings)
        assert len(constant.states) == 1
        assert_close(constant.states[-1], keep.states[round], 1e-6)


def test_groups_are_no_larger_than_the_cohort():
    keep = Keep()
    settings = {"rounds": 1, "group_size": 9, "callbacks": [keep]}
    fit(linear_task(), FOUR, fed_avg(local_steps=1, sampling=uniform(3)), **settings)
    assert keep.settings["group_size"] == 3


def test_records_tell_of_the_round():
    keep = Keep()
    algorithm = fed_avg(local_steps=3, sampling=uniform(2))
    start = time.perf_counter()
    result = fit(linear_task(), FOUR, algorithm, rounds=4, batch_size=4, seed=6, callbacks=[keep])
    took = time.perf_counter() - start
    assert result.history == keep.records
    seen = 0
    for r, record in enumerate(result.history):
        cohort = sample_cohort(FOUR, algorithm.work, r, 4, seed=6)
        weights = cohort.example_weight.sum((1, 2))
        seen += int(weights.sum())
        assert (record["round"], record["rounds"], record["examples"]) == (r + 1, 4, seen)
        assert record["clients"] == cohort.clients.tolist()
        assert record["loss"] == pytest.approx(np.average(record["client_loss"], weights=weights))
        ids = np.average(cohort.indices, weights=cohort.example_weight)
        assert record["metrics"]["id"] == pytest.approx(ids)
        assert record["seconds"] > 0
    kinds = [f"{kind}seconds" for kind in ("", "refresh_", "compile_")]
    assert sum(record[kind] for record in result.history for kind in kinds) <= took
    assert_equal(keep.states[-1].trainable, result.trainable)


@pytest.mark.parametrize("broken", ["loss", "parameters"])
def test_divergence_names_round_and_clients(broken):
    def loss(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        steps = trainable["steps"]
        bad = (jnp.isin(batch["id"], FOUR.clients[2])).any() & (steps > 1.5)
        # The square root has an infinite slope where its value is still finite.
        root = jnp.sqrt(jnp.where(bad, 0.0, 1.0) * (trainable["w"] ** 2).sum())
        trouble = jnp.where(bad, jnp.nan, 0.0) if broken == "loss" else root
        return value + trouble - steps, metrics

    task = linear_task(loss=loss)
    task.trainable["steps"] = np.zeros(())  # gradient −1: counts rounds at learning rate 1
    keep = Keep()
    labels = {"w": "still", "b": "still", "steps": "moves"}
    optimizer = optax.multi_transform({"still": optax.sgd(1e-3), "moves": optax.sgd(1.0)}, labels)
    with pytest.raises(DivergenceError, match=r"round 3: .*client\(s\): 2\. "):
        fit(task, FOUR, fed_avg(local_steps=1), group_size=3, optimizer=optimizer, callbacks=[keep])
    assert [record["round"] for record in keep.records] == [1, 2]


def test_divergence_of_the_server_is_named():
    algorithm = fed_avg(local_steps=1, server_optimizer=optax.sgd(np.inf))
    with pytest.raises(DivergenceError, match=r"round 1: .*none \(the server\)"):
        fit(linear_task(), FOUR, algorithm)


# --- clients side by side ----------------------------------------------------------------------


def test_a_group_size_is_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path))
    keep, settings = Keep(), {"group_size": None, "rounds": 1, "callbacks": []}
    fit(linear_task(), FOUR, fed_avg(local_steps=2), **settings | {"callbacks": [keep]})
    path = tmp_path / "group_sizes.json"
    (known,) = json.loads(path.read_text()).items()
    assert known[1] == keep.settings["group_size"] and known[1] in (1, 2, 4)
    for remembered in (1, 2):
        path.write_text(json.dumps({known[0]: remembered}))
        fit(linear_task(), FOUR, fed_avg(local_steps=2), **settings | {"callbacks": [keep]})
        assert keep.settings["group_size"] == remembered
    # A resumed run has the size it was begun with, whatever is remembered by now.
    saved = {"callbacks": [Checkpointer(tmp_path / "checkpoints"), keep]}
    fit(linear_task(), FOUR, fed_avg(local_steps=2), **settings | saved)
    path.write_text(json.dumps({known[0]: 1}))
    fit(linear_task(), FOUR, fed_avg(local_steps=2), **settings | saved | {"rounds": 2})
    assert keep.settings["group_size"] == 2


# --- refusals ----------------------------------------------------------------------------------


class Jump(Callback):
    def __init__(self, round):
        self.round = round

    def start(self, state):
        return type(state)(self.round, state.state, None, (), state.settings)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fit(linear_task(), FOUR), ConfigError, "algorithm for 4 clients"),
        (lambda: fit(linear_task(), []), DataError, "no examples"),
        (lambda: fit(linear_task(), EXAMPLES, rounds=0), ConfigError, "rounds .* got 0"),
        (lambda: fit(linear_task(), EXAMPLES, batch_size=0), ConfigError, "batch_size"),
        (lambda: fit(linear_task(), EXAMPLES, group_size=-1), ConfigError, "group_size"),
        (lambda: fit(linear_task(), EXAMPLES, refresh_every=0), ConfigError, "refresh_every"),
        (lambda: fit(linear_task(), EXAMPLES, seed=-1), ConfigError, "seed"),
        (lambda: fed_avg(local_steps=0), ConfigError, "local_steps must be at least 1, got 0"),
        (lambda: local_only(local_epochs=0), ConfigError, "local_epochs"),
        (lambda: fed_avg(weighting="size"), ConfigError, "got 'size'"),
        (
            lambda: fit(linear_task(), FOUR, fed_avg(sampling=uniform(5))),
            ConfigError,
            "has 4 clients",
        ),
        (
            lambda: fit(linear_task(collate=lambda e, r: {"x": np.ones(3)}), EXAMPLES),
            DataError,
            "'x' of the table has shape",
        ),
        (
            lambda: fit(linear_task(collate=lambda e, r: {"weight": np.ones(23)}), EXAMPLES),
            DataError,
            '"weight"',
        ),
        (
            lambda: fit(linear_task(), EXAMPLES, callbacks=[Callback(), Jump(2)]),
            ConfigError,
            "Jump restored round 2",
        ),
        (lambda: fit(linear_task(), EXAMPLES, callbacks=[Jump(11)]), ConfigError, "at round 11"),
    ],
)
def test_refusals_name_value_and_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_equal_settings_give_the_same_algorithm():
    pairs = itertools.product([fed_avg, local_only], [{"local_steps": 4}, {"local_epochs": 1}])
    assert all(make(**settings) is make(**settings) for make, settings in pairs)
    assert fed_avg(local_steps=4) is not fed_avg(local_steps=5)
