"""DP-SGD inside a client: clipping in NumPy, noise by its distribution, ε by how often one is read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from test_fed_lora import CLIENTS, NETWORK, chain_task
from tiny import random_adapters
from toy_rag import DATASET, toy_parts
from toys import EXAMPLES, FOUR, assert_close, linear_task, weighted_mean

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.algorithms.fed_lora import fed_lora
from fedrag_jax.federated.engine.cohort import sample_cohort
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.privacy.accounting import epsilon
from fedrag_jax.federated.privacy.steps import example_epsilon, private_steps
from fedrag_jax.federated.sampling import fixed
from fedrag_jax.federated.work import Work
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.retrieval.mining import Mining

pytest.importorskip("jax_privacy")
# Of jax-privacy 2.0 with optax from 0.2.8 on.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")
START = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}


def gradient_of(example, w, b):
    x, y = np.array(example["x"]), example["y"]
    error = x @ w + b - y
    return np.append(2 * error * x, 2 * error)


def test_gradients_are_clipped_one_by_one_in_numpy():
    task = private_steps(linear_task(), clip=0.7, noise_multiplier=0.0, batch_size=5)
    trainable = {name: jnp.asarray(x, jnp.float32) for name, x in START.items()}
    table = {name: jnp.asarray(x) for name, x in task.collate(EXAMPLES[:5], None).items()}
    weight = np.array([1, 1, 1, 1, 0.0])
    batch = table | {"weight": jnp.asarray(weight)}
    told, found = jax.value_and_grad(task.loss, has_aux=True)(
        trainable, {}, batch, jax.random.key(0)
    )
    each = np.array([gradient_of(e, START["w"], START["b"]) for e in EXAMPLES[:4]])
    norms = np.linalg.norm(each, axis=1)
    assert norms.min() < 0.7 < norms.max()
    expected = (each * np.minimum(1, 0.7 / norms)[:, None]).sum(0) / 5
    np.testing.assert_allclose(np.append(found["w"], found["b"]), expected, rtol=1e-4)
    plain, metrics = linear_task().loss(trainable, {}, batch, None)
    assert told[0] == pytest.approx(float(plain), rel=1e-5)
    assert told[1]["id"] == pytest.approx(float(metrics["id"]), rel=1e-5)


def test_one_example_moves_a_step_by_the_clip_at_most():
    task = private_steps(linear_task(), clip=0.3, noise_multiplier=0.0, batch_size=4)
    trainable = {name: jnp.asarray(x, jnp.float32) for name, x in START.items()}

    def step(y):
        examples = [*EXAMPLES[:3], {**EXAMPLES[3], "y": y}]
        table = {name: jnp.asarray(x) for name, x in task.collate(examples, None).items()}
        batch = table | {"weight": jnp.ones(4)}
        gradient, _ = jax.grad(task.loss, has_aux=True)(trainable, {}, batch, jax.random.key(0))
        return np.append(gradient["w"], gradient["b"])

    assert np.linalg.norm(step(1e6) - step(-1e6)) == pytest.approx(2 * 0.3 / 4, rel=1e-4)


def test_noise_of_a_step_is_gaussian_of_the_size_that_is_accounted_for():
    """z C / B for each number, of every client and step by itself; nothing is to be learned."""

    def flat_loss(trainable, frozen, batch, rng):
        return 0 * trainable["w"].sum() * weighted_mean(batch["y"], batch["weight"]), {}

    trainable = {"w": np.zeros(10_000, np.float32)}
    task = private_steps(
        linear_task(trainable=trainable, loss=flat_loss),
        clip=0.4,
        noise_multiplier=1.5,
        batch_size=6,
    )
    one, two = (
        fit(
            task, Partition(EXAMPLES, (rows,)), fed_avg(local_steps=2), rounds=1, batch_size=6,
            optimizer=optax.sgd(1.0),
        ).trainable["w"]
        for rows in (np.arange(8), np.arange(8))
    )  # fmt: skip
    np.testing.assert_array_equal(one, two)
    deviation = 1.5 * 0.4 / 6 * np.sqrt(2)  # of two steps
    assert stats.kstest(one / deviation, "norm").pvalue > 1e-3
    both = Partition(EXAMPLES, (np.arange(8), np.arange(8, 16)))
    how = {"rounds": 1, "batch_size": 6, "optimizer": optax.sgd(1.0)}
    mean = fit(task, both, fed_avg(local_steps=2), **how).trainable["w"]
    assert stats.kstest(mean / (deviation / np.sqrt(2)), "norm").pvalue > 1e-3


def most_visits(data, work, rounds, batch, seeds):
    """The squares of how often each step has an example, summed; of the example with the most."""
    held, most = len(data.clients[0]), 0
    for seed in range(seeds):
        counts = np.zeros(held)
        for round in range(rounds):
            cohort = sample_cohort(data, work, round, batch, seed)
            for rows, weight in zip(cohort.indices[0], cohort.example_weight[0], strict=True):
                counts += np.bincount(rows[weight > 0], minlength=held) ** 2
        most = max(most, counts.max())
    return int(most)


@pytest.mark.parametrize(("held", "batch", "steps"), [(8, 4, 3), (7, 4, 5), (3, 4, 2), (9, 5, 4)])
def test_an_example_pays_for_every_time_it_is_read(held, batch, steps):
    data, rounds = Partition(EXAMPLES, (np.arange(held),)), 6
    work = Work(local_steps=steps)
    most = most_visits(data, work, rounds, batch, seeds=30)
    spent = example_epsilon(3.0, data, work, rounds=rounds, batch_size=batch, delta=0.01)
    assert spent >= epsilon(3.0, 1.0, most, 0.01) - 1e-9
    if held % batch == 0 or held < batch:
        assert spent == epsilon(3.0, 1.0, most, 0.01)


@pytest.mark.parametrize(("held", "batch", "steps"), [(3, 2, 3), (3, 2, 1), (5, 4, 2), (3, 2, 6)])
def test_it_pays_for_no_more_than_it_can_be_read(held, batch, steps):
    """In these short runs, some shuffle has an example as often as the bound allows."""
    data, work = Partition(EXAMPLES, (np.arange(held),)), Work(local_steps=steps)
    most = most_visits(data, work, 1, batch, seeds=200)
    spent = example_epsilon(3.0, data, work, rounds=1, batch_size=batch, delta=0.01)
    assert spent == epsilon(3.0, 1.0, most, 0.01)


def test_the_smallest_client_pays_most():
    spent = [
        example_epsilon(2.0, data, Work(local_epochs=2), rounds=3, batch_size=4, delta=0.01)
        for data in (FOUR, Partition(EXAMPLES, (FOUR.clients[3],)))
    ]
    assert spent == [epsilon(2.0, 1.0, 6, 0.01)] * 2
    steps = Work(local_steps=3)
    few, many = (
        example_epsilon(
            2.0, Partition(EXAMPLES, (rows,)), steps, rounds=3, batch_size=4, delta=0.01
        )
        for rows in (FOUR.clients[0], FOUR.clients[3])
    )
    assert few > many


def test_without_clipping_and_noise_it_is_the_task():
    whole = Partition(EXAMPLES, tuple(rows for rows in FOUR.clients if len(rows) >= 4))
    free = private_steps(linear_task(), clip=1e6, noise_multiplier=0.0, batch_size=4)
    how = {"rounds": 2, "batch_size": 4, "optimizer": optax.sgd(0.05)}
    one, other = (fit(task, whole, fed_avg(local_steps=2), **how) for task in (linear_task(), free))
    assert_close(one.trainable, other.trainable, 1e-5)
    assert one.history[1]["loss"] == pytest.approx(other.history[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: private_steps(linear_task(), clip=0.0, noise_multiplier=1.0, batch_size=4),
            "clip must be > 0",
        ),
        (
            lambda: private_steps(
                linear_task(coupled=True), clip=1.0, noise_multiplier=1.0, batch_size=4
            ),
            "depends on the others of its batch",
        ),
        (
            lambda: example_epsilon(
                1.0, FOUR, Work(local_steps=1), rounds=1, batch_size=4, delta=0.05
            ),
            "delta 0.05 is not below 1/23",
        ),
        (
            lambda: example_epsilon(
                0.0, FOUR, Work(local_steps=1), rounds=1, batch_size=4, delta=0.01
            ),
            "noise_multiplier 0.0 gives no ε",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_step_does_not_depend_on_how_batches_are_cut():
    """A client with two examples beside one with eight, and by itself: B is that of the fit."""
    task = private_steps(linear_task(), clip=0.01, noise_multiplier=0.0, batch_size=8)
    how = {"rounds": 1, "batch_size": 8, "optimizer": optax.sgd(1.0)}
    rows = np.arange(2)
    each = np.array([gradient_of(EXAMPLES[i], START["w"], START["b"]) for i in rows])
    expected = -(each * (0.01 / np.linalg.norm(each, axis=1))[:, None]).sum(0) / 8
    for others in ((), (np.arange(2, 10), np.arange(10, 18))):
        data = Partition(EXAMPLES, (rows, *others))
        algorithm = fed_avg(local_steps=1, sampling=fixed(0))
        found = fit(task, data, algorithm, **how).trainable
        moved = np.append(found["w"] - START["w"], found["b"] - START["b"])
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-7)


def test_a_larger_batch_than_was_said_is_refused():
    task = private_steps(linear_task(), clip=0.01, noise_multiplier=0.0, batch_size=4)
    with pytest.raises(ConfigError, match="batch_size is 4, but a batch has 8 examples"):
        fit(task, EXAMPLES, rounds=1, batch_size=8)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora"])
def test_gradients_of_what_is_trained_are_clipped(rule):
    """A step of one example whose gradient is far above C has the length C, whatever is fixed."""
    start = chain_task(jax.tree.map(lambda x: 0.3 * x, random_adapters(NETWORK, 0)))
    task = private_steps(start, clip=0.01, noise_multiplier=0.0, batch_size=1)
    one = Partition(CLIENTS.examples, (np.array([0]),))
    algorithm = fed_lora(rule, NETWORK, local_steps=1)
    found = fit(task, one, algorithm, rounds=1, batch_size=1, optimizer=optax.sgd(1.0)).trainable
    moved = jax.tree.map(lambda a, b: np.square(np.asarray(a) - b).sum(), found, start.trainable)
    assert np.sqrt(sum(jax.tree.leaves(moved))) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("negatives", [{"mining": Mining(count=1)}, {"negatives": {}}, {}])
def test_ranking_has_no_steps_that_are_private_for_each_question(negatives):
    """Also with negatives beside those of the batch, when no client is idle."""
    task = multiple_negatives_ranking(toy_parts().retriever, DATASET, **negatives)
    with pytest.raises(ConfigError, match=f"in '{task.name}' the loss of a question depends on"):
        private_steps(task, clip=1.0, noise_multiplier=1.0, batch_size=4)
