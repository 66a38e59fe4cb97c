"""What of its questions stands in a client's update: words by three attacks.

`touched`: a row of the embedding table moves where its token was read, and else stays (Melis et al.
    2019, arXiv 1805.04049).
`placed`: the gradient of the first layer's query projection is Xᵀ dQ, so that what went in, of every
    token at every place, lies in the span of its columns, and else does not, while a batch holds fewer
    tokens than the model is wide (DAGER, Petrov et al. 2024, arXiv 2405.15586, section 4.1). Those of
    keys and values have the same span.
`matched`: the gradient of a question that is known, such as one of a public set, points along the
    update of a batch that it was in (after Nasr et al. 2019, arXiv 1812.00910, without a classifier).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.task import PyTree, Task


def moved(after: PyTree, before: PyTree) -> PyTree:
    """The update of a model, in NumPy."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), after, before)


def touched(update: np.ndarray) -> np.ndarray:
    """How far the row of each token moved, float [V].

    Args:
      update: [V, D] of the embedding table.
    """
    return np.linalg.norm(update, axis=1)


def r_precision(scores, truth) -> float:
    """Of the R best-scored things the share that are true, R being how many are. Ties count against the
    attacker.

    Args:
      scores: float [N]; truth: bool [N].

    Raises:
      DataError: nothing is true.
    """
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth, bool)
    if not truth.any():
        raise DataError("nothing is true among what was scored")
    order = np.lexsort((truth, -scores))
    return float(truth[order[: truth.sum()]].mean())


def first_inputs(encoder: Network, params: PyTree, tokens, places: int) -> np.ndarray:
    """What the first layer of an encoder reads of tokens [N] at each of so many places: [places, N, D].

    Raises:
      ConfigError: a network that is no encoder with a table of positions.
    """
    if "position_embed" not in params:
        raise ConfigError(
            "what goes into the first layer is known of encoders with positions alone"
        )
    first, norm = encoder.config.first_position, params["embed_norm"]
    x = np.asarray(params["embed"]["embedding"], np.float64)[np.asarray(tokens)][None]
    x = x + np.asarray(params["position_embed"]["embedding"])[first : first + places, None]
    if encoder.config.type_vocab_size:
        x = x + np.asarray(params["type_embed"]["embedding"])[0]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + encoder.config.norm_epsilon)
    return x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def first_gradient(update: PyTree) -> np.ndarray:
    """Of the matrices that the inputs of an encoder's first layer meet, side by side: [D, 3 D]."""
    met = update["layers"]["attention"]
    names = "q_proj", "k_proj", "v_proj"
    return np.concatenate([np.asarray(met[name]["kernel"][0]) for name in names], axis=1)


def placed(gradient: np.ndarray, inputs: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """How much of each input is outside of the gradient's column space, in [0, 1]: [...].

    It is 0 for what was read.

    Args:
      gradient: [D, E] of matrices that multiply inputs from the right, as of `first_gradient`.
      inputs: [..., D].
      tolerance: singular values below so much of the largest are rounding; in float32 of gradients
        they are at 1e-8.

    Raises:
      DataError: a gradient of full rank, in whose span everything lies.
    """
    u, s, _ = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    basis = u[:, s > tolerance * s[0]] if s[0] > 0 else u[:, :0]
    if basis.shape[1] >= len(gradient):
        raise DataError(
            f"the gradient has full rank {len(gradient)}: the batch holds as many tokens as the model "
            "is wide, or what was sent is no gradient, and every token lies in its span"
        )
    inside = inputs @ basis
    squares = np.square(inputs).sum(-1)
    return np.sqrt(np.maximum(squares - np.square(inside).sum(-1), 0) / squares)


def matched(task: Task, trainable: PyTree, examples: Sequence, update: PyTree) -> np.ndarray:
    """Cosine [N] between the update and a step against the gradient of each example by itself.

    Args:
      task: whose loss has a gradient for one example, so no ranking among a batch.
      trainable: where the client started.

    Raises:
      DataError: an update of nothing.
    """
    norm = np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(update)))
    if not norm:
        raise DataError("the update is zero, and nothing points along it")
    direction = jax.tree.map(lambda x: jnp.asarray(x / norm, jnp.float32), update)
    table = {name: jnp.asarray(column) for name, column in task.table(examples).items()}
    return np.array([
        float(_cosine(task.loss, trainable, task.frozen, table, direction, np.int32(i)))
        for i in range(len(examples))
    ])  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _cosine(loss, trainable, frozen, table, direction, row):
    batch = {name: column[row][None] for name, column in table.items()}
    batch["weight"] = jnp.ones(1)
    gradient, _ = jax.grad(loss, has_aux=True)(trainable, frozen, batch, jax.random.key(0))
    along = jax.tree.map(lambda g, d: -(g * d).sum(), gradient, direction)
    squares = jax.tree.map(lambda g: jnp.square(g).sum(), gradient)
    along, squares = (jnp.stack(jax.tree.leaves(x)).sum() for x in (along, squares))
    return along / jnp.maximum(jnp.sqrt(squares), 1e-20)
