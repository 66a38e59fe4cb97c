"""Models of clients' own: Ditto, local parts, fine-tuning, each against NumPy and its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms import RATE, START, shares, steps
from test_fed_lora import CLIENTS, NETWORK, SGD, chain_task
from tiny import random_adapters
from toys import EXAMPLES, FOUR, assert_close, assert_equal, leaves, linear_task, mlp_task

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithms.by_name import PERSONAL, check, personal
from fedrag_jax.federated.algorithms.compressed import compressed
from fedrag_jax.federated.algorithms.ditto import ditto
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.algorithms.fine_tuned import fine_tuned
from fedrag_jax.federated.algorithms.local_only import local_only
from fedrag_jax.federated.algorithms.local_parts import local_parts
from fedrag_jax.federated.algorithms.secure import secure
from fedrag_jax.federated.compression.quantisation import quantised
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sampling import fixed
from fedrag_jax.tracking.checkpoints import Checkpointer


def trained(algorithm, rounds=3, task=None, **settings):
    settings = {"optimizer": optax.sgd(RATE), "batch_size": 9, "group_size": 3} | settings
    with jax.enable_x64(True):
        return fit(task or linear_task(), FOUR, algorithm, rounds=rounds, **settings)


def models(result) -> np.ndarray:
    """[4, 4], a row for each client of the linear task."""
    return np.column_stack([result.trainable["w"], result.trainable["b"]])


# --- in NumPy ----------------------------------------------------------------------------------


def test_ditto_in_numpy():
    x, v = START, [START] * 4
    for _ in range(3):
        v = [
            steps(v_k, rows, lambda g, v, x=x: g + 0.7 * (v - x))
            for v_k, rows in zip(v, FOUR.clients, strict=True)
        ]
        x = x + shares() @ [steps(x, rows) - x for rows in FOUR.clients]
    found = models(trained(ditto(lam=0.7, local_steps=3)))
    np.testing.assert_allclose(found, v, atol=1e-12)


def test_a_global_model_that_diverges_ends_ditto():
    """It is at -2 after a round, where there is no slope; the clients' own are at -1 and -3."""

    def loss(trainable, frozen, batch, rng):
        slope = jnp.where(trainable["w"] == -2, jnp.inf, batch["y"].mean())
        return trainable["w"] * slope, {}

    examples = [EXAMPLES[0] | {"y": 1.0}, EXAMPLES[1] | {"y": 3.0}]
    data = Partition(examples, (np.array([0]), np.array([1])))
    task = linear_task(trainable={"w": np.float32(0)}, loss=loss)
    how = {"optimizer": optax.sgd(1.0), "batch_size": 1}
    alone = fit(task, data, local_only(local_steps=1), rounds=2, **how)
    np.testing.assert_array_equal(alone.trainable["w"], [-2, -6])
    with pytest.raises(DivergenceError, match=r"round 2: .* client\(s\): 0, 1\."):
        fit(task, data, ditto(lam=0.0, local_steps=1), rounds=2, **how)


def test_local_parts_in_numpy():
    """The offset b stays, the slope w is averaged; clients 0 and 2 alone take part."""
    w, b = START[:3], np.full(4, START[3])
    p = np.array([2, 8]) / 10
    for _ in range(3):
        ends = [steps(np.append(w, b[k]), FOUR.clients[k]) for k in (0, 2)]
        w = w + p @ [end[:3] - w for end in ends]
        b[[0, 2]] = [end[3] for end in ends]
    algorithm = local_parts(private=("b",), local_steps=3, sampling=fixed(0, 2))
    found = trained(algorithm)
    np.testing.assert_allclose(models(found), [[*w, b_k] for b_k in b], atol=1e-12)
    sizes = [found.history[0][f"bytes_{way}"] for way in ("up", "down")]
    assert sizes == [2 * 3 * 8] * 2  # w in float64


def test_fine_tuning_in_numpy():
    x = START
    for _ in range(2):
        x = x + shares() @ [steps(x, rows) - x for rows in FOUR.clients]
    alone = [steps(x, rows, count=6) for rows in FOUR.clients]  # SGD keeps nothing
    found = trained(fine_tuned(together=2, alone=2, local_steps=3), rounds=4)
    np.testing.assert_allclose(models(found), alone, atol=1e-12)
    assert [r["bytes_up"] for r in found.history] == [4 * 4 * 8] * 2 + [0, 0]
    # What the second round made goes down once more.
    assert [r["bytes_down"] for r in found.history] == [4 * 4 * 8] * 3 + [0]
    early = trained(fine_tuned(together=2, alone=2, local_steps=3), rounds=2)
    np.testing.assert_allclose(models(early), [x] * 4, atol=1e-12)


def test_who_is_not_drawn_alone_keeps_the_global_model():
    x = START
    for _ in range(2):
        x = x + np.array([2, 8]) / 10 @ [steps(x, FOUR.clients[k]) - x for k in (0, 2)]
    algorithm = fine_tuned(together=2, alone=1, local_steps=3, sampling=fixed(0, 2))
    expected = [steps(x, FOUR.clients[k]) if k in (0, 2) else x for k in range(4)]
    np.testing.assert_allclose(models(trained(algorithm)), expected, atol=1e-12)


# --- special cases that agree ------------------------------------------------------------------

ADAM = {"optimizer": optax.adam(0.02), "batch_size": 3}


@pytest.mark.parametrize(
    "algorithm",
    [ditto(lam=0.0, local_steps=3), fine_tuned(together=0, alone=3, local_steps=3)],
    ids=["ditto", "fine_tuned"],
)
def test_without_the_others_it_is_local_training(algorithm):
    """Under AdamW, whose moments must carry on."""
    expected = trained(local_only(local_steps=3), **ADAM)
    found = trained(algorithm, **ADAM)
    assert_close(found.trainable, expected.trainable, 1e-12)
    assert [r["client_loss"] for r in found.history] == [r["client_loss"] for r in expected.history]


def test_without_an_end_alone_it_is_averaging():
    expected = leaves(trained(fed_avg(local_steps=3), **ADAM).trainable)
    found = trained(fine_tuned(together=3, alone=0, local_steps=3), **ADAM).trainable
    for client in range(4):
        np.testing.assert_allclose(
            leaves(jax.tree.map(lambda x, k=client: x[k], found)), expected, atol=1e-12
        )


def test_ditto_holds_models_near_the_global_one():
    """The larger λ, the nearer; its global model is that of averaging."""
    shared = trained(fed_avg(local_steps=3), rounds=12).trainable
    x = np.append(shared["w"], shared["b"])
    far = [
        np.linalg.norm(models(trained(ditto(lam=lam, local_steps=3), rounds=12)) - x, axis=1).max()
        for lam in (0.0, 1.0, 8.0)
    ]
    assert far[0] > far[1] > far[2]


def test_fedsa_is_one_of_local_parts():
    task = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    found = fit(task, CLIENTS, local_parts(private=("lora_b",)), rounds=2, **SGD)
    expected = fit(task, CLIENTS, fed_lora("fedsa", NETWORK), rounds=2, **SGD)
    assert_close(found.trainable, expected.trainable, 1e-6)
    assert found.history[1]["bytes_up"] == expected.history[1]["bytes_up"]


@pytest.mark.parametrize(
    "algorithm",
    [
        ditto(lam=0.5, local_steps=2),
        pytest.param(local_parts(private=("out",), local_steps=2), marks=pytest.mark.slow),
        pytest.param(fine_tuned(together=1, alone=3, local_steps=2), marks=pytest.mark.slow),
    ],
    ids=["ditto", "local_parts", "fine_tuned"],
)
def test_a_resumed_run_is_the_run(algorithm, tmp_path):
    settings = {"optimizer": optax.adam(1e-2), "batch_size": 3, "task": mlp_task()}
    whole = trained(algorithm, rounds=4, **settings)
    trained(algorithm, rounds=2, callbacks=[Checkpointer(tmp_path)], **settings)
    resumed = trained(algorithm, rounds=4, callbacks=[Checkpointer(tmp_path)], **settings)
    assert_equal(resumed.trainable, whole.trainable)


# --- by name, and refusals ---------------------------------------------------------------------


def test_they_are_chosen_by_name():
    assert {*PERSONAL} == {"ditto", "local_parts", "fine_tuned", "fedsa"}
    assert personal("ditto", lam=2.0, local_steps=3) is ditto(lam=2.0, local_steps=3)
    assert personal("local_parts", private=["b"]) is local_parts(private=("b",))
    with pytest.raises(ConfigError, match="no personal algorithm 'fedavg'; choose among"):
        personal("fedavg")
    for name in PERSONAL:
        with pytest.raises(
            ConfigError, match=f"here: {name} leaves each client a model of its own"
        ):
            check(name, {}, "here")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ditto(lam=-1.0), "lam must be at least 0, got -1"),
        (lambda: local_parts(private=()), "name the parts that stay with the clients"),
        (lambda: trained(local_parts(private=("c",))), r"named \['c'\]; choose among \['b', 'w'\]"),
        (lambda: trained(local_parts(private=("w", "b"))), "nothing is averaged; take local_only"),
        (lambda: fine_tuned(together=-1), "sum at least 1, got -1 and 2"),
        (lambda: fine_tuned(together=0, alone=0), "got 0 and 0"),
        (lambda: trained(fine_tuned(together=1, alone=1)), "the fit has 3 rounds"),
        (lambda: compressed(ditto(), up=quantised(8)), "ditto.*leaves a model with each client"),
        (lambda: secure(local_parts(private=("b",))), "leaves models with its clients"),
    ],
)  # fmt: skip
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
