"""One battery over all algorithms, and each against a slow, obvious NumPy version."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import (
    EXAMPLES,
    FOUR,
    assert_close,
    assert_equal,
    leaves,
    linear_task,
    mlp_task,
    squared_error,
)

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_avg_m import fed_avg_m
from fedrag_jax.federated.algorithms.fed_opt import fed_adagrad, fed_adam, fed_yogi
from fedrag_jax.federated.algorithms.fed_prox import fed_prox
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.robust import robust
from fedrag_jax.federated.algorithms.scaffold import scaffold
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.robust.coordinates import median
from fedrag_jax.federated.sampling import uniform, weighted
from fedrag_jax.tracking.checkpoints import Checkpointer

ALGORITHMS = {
    "fed_avg": (fed_avg, {}),
    "fed_avg uniform, carried": (fed_avg, {"weighting": "uniform", "carry_optimizer": True}),
    "fed_avg_m": (fed_avg_m, {"learning_rate": 0.7, "momentum": 0.8}),
    "fed_adagrad": (fed_adagrad, {"learning_rate": 0.1, "b1": 0.3}),
    "fed_adam": (fed_adam, {"learning_rate": 0.1}),
    "fed_yogi": (fed_yogi, {"learning_rate": 0.1}),
    "fed_prox": (fed_prox, {"mu": 0.3}),
    "scaffold": (scaffold, {"client_learning_rate": 0.05, "server_learning_rate": 0.8}),
    "local_only": (local_only, {}),
}
battery = pytest.mark.parametrize("name", ALGORITHMS)


def make(name, **work):
    algorithm, settings = ALGORITHMS[name]
    return algorithm(**settings | work)


def run(name, task, *, data=FOUR, rounds=3, work=None, **settings):
    """Three rounds of everything that could go wrong: sampling, stragglers, epochs of any length."""
    work = {"local_epochs": 1, "sampling": uniform(3), "stragglers": 0.5} if work is None else work
    own = make(name).optimizer is not None
    settings = {"batch_size": 3, "seed": 4} | settings
    optimizer = None if own else settings.pop("optimizer", optax.adam(1e-2))
    settings.pop("optimizer", None)
    return fit(task, data, make(name, **work), rounds=rounds, optimizer=optimizer, **settings)


# --- the battery -------------------------------------------------------------------------------


@pytest.mark.slow
@battery
def test_group_sizes_agree_and_so_does_debugging(name):
    with jax.enable_x64(True):
        one = run(name, mlp_task(dropout=True))
        others = [
            run(name, mlp_task(dropout=True), **kind)
            for kind in ({"group_size": 3}, {"debug": True})
        ]
    for other in others:
        assert_close(other.trainable, one.trainable, 1e-9)
        for a, b in zip(other.history, one.history, strict=True):
            assert a["clients"] == b["clients"] and a["examples"] == b["examples"]
            assert a["client_loss"] == pytest.approx(b["client_loss"], abs=1e-9)


@battery
def test_a_resumed_run_is_the_run(name, tmp_path):
    whole = run(name, mlp_task(), rounds=4)
    run(name, mlp_task(), rounds=2, callbacks=[Checkpointer(tmp_path)])
    resumed = run(name, mlp_task(), rounds=4, callbacks=[Checkpointer(tmp_path)])
    assert_equal(resumed.trainable, whole.trainable)


@battery
def test_nothing_to_learn_changes_nothing(name):
    """A loss without slope; and a rate of zero, which scaffold refuses."""

    def flat(trainable, frozen, batch, rng):
        value, metrics = squared_error(trainable, frozen, batch, rng)
        return 0 * value, metrics

    own = make(name).optimizer is not None
    task = linear_task(loss=flat) if own else linear_task()
    result = run(name, task, optimizer=optax.sgd(0.0))
    start = jax.tree.map(np.float32, linear_task().trainable)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 0 * x), result.trainable, start)


@battery
def test_training_lowers_the_loss_on_examples_held_out(name):
    rng = np.random.default_rng(1)
    truth = np.array([1.0, -2.0, 0.5])
    examples = [
        {"id": i, "x": x, "y": float(x @ truth)} for i, x in enumerate(rng.normal(size=(60, 3)))
    ]
    data = dataclasses.replace(FOUR, examples=examples[:23])
    settings = {"data": data, "rounds": 20, "optimizer": optax.sgd(0.05)}
    result = run(name, linear_task(), work={"local_steps": 5}, **settings)
    x, y = (np.array([e[c] for e in examples[23:]]) for c in "xy")
    w, b = np.asarray(result.trainable["w"]), np.asarray(result.trainable["b"])
    error = ((x @ w[..., None] + b[..., None, None] - y[:, None]) ** 2).mean()
    before = ((x @ linear_task().trainable["w"] + 0.25 - y) ** 2).mean()
    assert error < before / 3


@battery
def test_the_same_settings_are_the_same_object_and_others_are_not(name):
    assert make(name, local_steps=3) is make(name, local_steps=3)
    assert make(name) is make(name, stragglers=0, local_steps=10)
    assert make(name, local_steps=3).name != make(name, local_steps=4).name
    assert make(name).name.startswith(name.split(" ", maxsplit=1)[0] + "(")


# --- NumPy -------------------------------------------------------------------------------------

RATE, SETTINGS = 0.05, {"rounds": 3, "batch_size": 9}
START = np.array([0.5, -1.0, 2.0, 0.25])


def gradient(theta, rows):
    x, y = (np.array([EXAMPLES[i][name] for i in rows]) for name in "xy")
    error = 2 * (x @ theta[:3] + theta[3] - y) / len(rows)
    return np.append(error @ x, error.sum())


def steps(theta, rows, correct=lambda g, y: g, count=3):
    """SGD on all examples of a client."""
    y = theta
    for _ in range(count):
        y = y - RATE * correct(gradient(y, rows), y)
    return y


def shares(weighting="examples"):
    return np.array([2, 5, 8, 8]) / 23 if weighting == "examples" else np.full(4, 0.25)


def trained(algorithm, **settings):
    settings = SETTINGS | {"group_size": 3} | settings
    if algorithm.optimizer is None:
        settings["optimizer"] = optax.sgd(RATE)
    with jax.enable_x64(True):
        result = fit(linear_task(), FOUR, algorithm, **settings)
        return np.append(result.trainable["w"], result.trainable["b"])


def with_server(server):
    """Rounds of averaging whose mean update goes through `server(x, mean update)`."""
    x = START
    for _ in range(3):
        x = server(x, shares() @ [steps(x, rows) - x for rows in FOUR.clients])
    return x


def test_momentum_in_numpy():
    v = np.zeros(4)

    def server(x, delta):
        nonlocal v
        v = 0.8 * v + delta
        return x + 0.7 * v

    expected = with_server(server)
    found = trained(fed_avg_m(learning_rate=0.7, momentum=0.8, local_steps=3))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_adaptive_servers_in_numpy(kind):
    eta, b1, b2, tau = 0.1, 0.3, 0.6, 0.02
    m, v = np.zeros(4), np.full(4, tau**2)

    def server(x, delta):
        nonlocal m, v
        m = b1 * m + (1 - b1) * delta
        for i in range(4):
            square = delta[i] ** 2
            if kind == "adagrad":
                v[i] = v[i] + square
            elif kind == "adam":
                v[i] = b2 * v[i] + (1 - b2) * square
            else:
                v[i] = v[i] - (1 - b2) * square * np.sign(v[i] - square)
        return x + eta * m / (np.sqrt(v) + tau)

    expected = with_server(server)
    make = {"adagrad": fed_adagrad, "adam": fed_adam, "yogi": fed_yogi}[kind]
    settings = {"learning_rate": eta, "b1": b1, "tau": tau, "local_steps": 3}
    if kind != "adagrad":
        settings["b2"] = b2
    np.testing.assert_allclose(trained(make(**settings)), expected, atol=1e-12)


def test_fed_prox_in_numpy():
    x = START
    for _ in range(3):
        ends = [steps(x, rows, lambda g, y, x=x: g + 0.3 * (y - x)) for rows in FOUR.clients]
        x = x + shares() @ [y - x for y in ends]
    np.testing.assert_allclose(trained(fed_prox(mu=0.3, local_steps=3)), x, atol=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_scaffold_in_numpy(weighting):
    # Two of four clients a round, whose numbers the records tell.
    algorithm = scaffold(
        RATE, server_learning_rate=0.8, weighting=weighting, local_steps=3, sampling=uniform(2)
    )
    keep = Keep()
    found = trained(algorithm, callbacks=[keep])
    x, c, c_k = START, np.zeros(4), np.zeros((4, 4))
    for record in keep.records:
        chosen = record["clients"]
        ends, new = [], c_k.copy()
        for k in chosen:
            y = steps(x, FOUR.clients[k], lambda g, y, d=c - c_k[k]: g + d)
            new[k] = c_k[k] - c + (x - y) / (3 * RATE)
            ends.append(y)
        p = shares(weighting)[chosen] / shares(weighting)[chosen].sum()
        x = x + 0.8 * p @ [y - x for y in ends]
        c = c + 2 / 4 * np.mean([new[k] - c_k[k] for k in chosen], axis=0)
        c_k = new
    np.testing.assert_allclose(found, x, atol=1e-12)
    kept = keep.state.population
    np.testing.assert_allclose(np.column_stack([kept["w"], kept["b"]]), c_k, atol=1e-12)
    # The server's is the mean of the clients'.
    np.testing.assert_allclose(c, c_k.mean(0), atol=1e-12)
    assert_close(keep.state.server["c"], {"w": c[:3], "b": c[3]}, 1e-12)


def test_scaffold_counts_the_steps_a_client_took():
    """Of one and three steps: (x − y) / (S η) is the mean gradient of each."""
    keep = Keep()
    trained(scaffold(RATE, local_epochs=1), batch_size=4, rounds=1, callbacks=[keep])
    counts = [1, 2, 2, 2]
    assert [-(-len(rows) // 4) for rows in FOUR.clients] == counts
    kept = np.column_stack([keep.state.population["w"], keep.state.population["b"]])
    np.testing.assert_allclose(kept[0], gradient(START, FOUR.clients[0]), atol=1e-12)


class Keep(Callback):
    def __init__(self):
        self.records = []

    def round_end(self, state, record):
        self.records.append(record)
        self.state = jax.tree.map(np.array, state.state)


# --- special cases that agree ------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        fed_prox(mu=0.0, local_steps=3),
        fed_avg_m(momentum=0.0, local_steps=3),
        scaffold(RATE, weighting="examples", local_steps=3),  # control variates are zero so far
    ],
    ids=lambda a: a.name,
)
def test_neutral_settings_are_fed_avg(algorithm):
    expected = trained(fed_avg(local_steps=3), rounds=1)
    np.testing.assert_allclose(trained(algorithm, rounds=1), expected, atol=1e-12)


def test_scaffold_with_one_client_is_fed_avg():
    with jax.enable_x64(True):
        sgd = {"optimizer": optax.sgd(RATE)}
        found, expected = (
            fit(linear_task(), EXAMPLES, algorithm, rounds=3, **optimizer).trainable
            for algorithm, optimizer in ((scaffold(RATE), {}), (fed_avg(), sgd))
        )
    assert_close(found, expected, 1e-12)


def test_one_client_alone_is_centralised():
    ends = [
        fit(linear_task(), EXAMPLES, algorithm, optimizer=optax.adam(0.01), seed=3).trainable
        for algorithm in (centralised(), local_only(), fed_avg(carry_optimizer=True))
    ]
    for end in ends[1:]:
        assert_close(end, ends[0], 1e-6)


# --- debugging ---------------------------------------------------------------------------------


def test_debugging_names_client_step_and_batch():
    def loss(trainable, frozen, batch, rng):
        value = (trainable["w"] ** 2).sum() + 0 * trainable["b"]
        return jnp.where((batch["id"] == 7).any(), jnp.nan, value), {}

    with pytest.raises(DivergenceError, match=r"round 1: .*client\(s\): \d\b.*debug=True"):
        fit(linear_task(loss=loss), FOUR, fed_avg(local_epochs=1), batch_size=2)
    who = next(k for k, rows in enumerate(FOUR.clients) if 7 in rows)
    with pytest.raises(
        DivergenceError, match=rf"client {who}, step \d, batch of .*example 7 \(7\)"
    ):
        fit(linear_task(loss=loss), FOUR, fed_avg(local_epochs=1), batch_size=2, debug=True)


def test_debugging_adds_the_place_to_an_error():
    def loss(trainable, frozen, batch, rng):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        fit(linear_task(loss=loss), FOUR, fed_avg(), batch_size=2, debug=True)
    notes = "".join(caught.value.__notes__)
    assert "in client 0, step 0, batch of example" in notes


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fed_prox(mu=-1), "mu must be at least 0, got -1"),
        (lambda: scaffold(0.0), "client_learning_rate must be > 0, got 0.0"),
        (lambda: scaffold(0.1, weighting="size"), "got 'size'"),
        (lambda: fed_adam(tau=0.0), "tau must be > 0, got 0.0"),
        (lambda: fed_yogi(b2=1.0), r"b2 must be in \[0, 1\), got 1.0"),
        (lambda: fed_avg_m(learning_rate=-1), "learning_rate must be > 0, got -1"),
        (lambda: fed_avg(sampling=weighted(2)), 'set weighting="uniform"'),
        (lambda: fed_avg(dropout=1.0), "dropout is a probability below 1, got 1.0"),
        (lambda: fed_avg(stragglers=-0.1), "stragglers is a probability"),
        (lambda: fit(linear_task(), FOUR, centralised()), "there are 4 clients"),
        (
            lambda: fit(linear_task(), FOUR, scaffold(0.1), optimizer=optax.adam(0.1)),
            "has its own client optimizer; leave `optimizer` out",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_server_step_moves_as_much_as_its_rate_at_most_by_adam():
    """m / (√v + τ) without bias correction: the first step is (1 − β₁) Δ / (√(…) + τ)."""
    algorithm = fed_adam(learning_rate=0.5, b1=0.9, b2=0.99, tau=1e-9, local_steps=3)
    first = trained(algorithm, rounds=1) - START
    np.testing.assert_allclose(np.abs(first), 0.5 * 0.1 / 0.1, rtol=1e-4)
    assert leaves({"first": first}).any()


def test_algorithms_that_weight_uniformly_sample_by_examples():
    for make in (scaffold, functools.partial(robust, median())):
        arguments = (0.1,) if make is scaffold else ()
        assert make(*arguments, sampling=weighted(2)).work.weighting == "uniform"


@pytest.mark.parametrize("local_steps", [1, 10])
def test_examples_that_nobody_holds_are_not_read(local_steps):
    def collate(examples, retrieved):
        assert max(e["id"] for e in examples) < 4
        return linear_task().collate(examples, retrieved)

    held = Partition(EXAMPLES, (np.arange(2), np.arange(2, 4)))
    algorithm = fed_avg(local_steps=local_steps)
    how = {"rounds": 2, "batch_size": 2, "optimizer": optax.sgd(0.01)}
    found = fit(linear_task(collate=collate), held, algorithm, **how)
    alone = Partition(EXAMPLES[:4], held.clients)
    assert_equal(found.trainable, fit(linear_task(), alone, algorithm, **how).trainable)
