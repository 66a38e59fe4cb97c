"""Tasks small enough to check by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.partition import Partition
from fedrag_jax.objectives.task import Task


def make_examples(count: int = 23, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"id": i, "x": rng.normal(size=3), "y": float(rng.normal()), "topic": "abcd"[i % 4]}
        for i in range(count)
    ]


def collate(examples, retrieved):
    dtype = jnp.zeros(()).dtype  # float64 where that is on
    return {
        "x": np.array([e["x"] for e in examples], dtype),
        "y": np.array([e["y"] for e in examples], dtype),
        "id": np.array([e["id"] for e in examples], np.int32),
    }


def weighted_mean(values, weight):
    weight = weight.astype(jnp.result_type(float))
    return (values.astype(weight.dtype) * weight).sum() / weight.sum()


class CountedLoss:
    """A loss that knows how often it was traced."""

    def __init__(self, loss):
        self.loss, self.traces = loss, 0

    def __call__(self, *arguments):
        self.traces += 1
        return self.loss(*arguments)


def squared_error(trainable, frozen, batch, rng):
    weight = batch["weight"]
    error = (batch["x"] @ trainable["w"] + trainable["b"] - batch["y"]) ** 2
    return weighted_mean(error, weight), {"id": weighted_mean(batch["id"], weight)}


def linear_task(**changes) -> Task:
    trainable = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.25)}
    settings = {"name": "linear", "trainable": trainable, "frozen": {}, "loss": squared_error}
    return Task(**settings | {"collate": collate} | changes)


def mlp_loss(trainable, frozen, batch, rng):
    hidden = jnp.tanh(batch["x"] @ trainable["in"] + frozen["bias"][None])
    if "dropout" in frozen:
        hidden = hidden * jax.random.bernoulli(rng, 1 - frozen["dropout"], hidden.shape)
    error = (hidden @ trainable["out"] - batch["y"]) ** 2
    return weighted_mean(error, batch["weight"]), {"error": weighted_mean(error, batch["weight"])}


def mlp_task(dropout: bool = False) -> Task:
    rng = np.random.default_rng(7)
    trainable = {"in": rng.normal(size=(3, 5)), "out": rng.normal(size=5)}
    frozen = {"bias": rng.normal(size=5), "steps": np.arange(3)}  # no gradient: integers pass
    if dropout:
        frozen["dropout"] = np.array(0.2)
    return Task("mlp", trainable, frozen, mlp_loss, collate)


EXAMPLES = make_examples()
FOUR = Partition(  # 2, 5, 8 and 8 examples
    EXAMPLES, tuple(np.split(np.random.default_rng(5).permutation(23), [2, 7, 15]))
)


def leaves(tree) -> np.ndarray:
    """All numbers of a tree in a row."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, tolerance):
    np.testing.assert_allclose(leaves(tree), leaves(other), rtol=0, atol=tolerance)
