"""Reconstruction of a client's questions from its update, by three attacks.

`touched`: a row of the embedding table changes only if its token was read (Melis et al. 2019, arXiv
    1805.04049).
`placed`: the gradient of the first layer's query projection is Xᵀ dQ. The inputs of the layer, one for
    each token at each position, therefore lie in the span of its columns. Other inputs do not, as long
    as a batch has fewer tokens than the model's width (DAGER, Petrov et al. 2024, arXiv 2405.15586,
    section 4.1). The gradients of the key and value projections have the same span. That of an
    adapter's A is Xᵀ (dQ Bᵀ), with a span of at most `rank` dimensions: once B is not zero, it holds
    the inputs of batches with no more tokens than the layer's adapters have ranks together.
`matched`: the gradient of a known question, such as one of a public set, is similar to the update of a
    batch that contained the question (after Nasr et al. 2019, arXiv 1812.00910, without a classifier).
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
    """Returns the update of a model, `after - before`, as NumPy arrays."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), after, before)


def touched(update: np.ndarray) -> np.ndarray:
    """Returns the norm of the change of each token's row, float [V].

    Args:
      update: [V, D], the update of the embedding table.
    """
    return np.linalg.norm(update, axis=1)


def r_precision(scores, truth) -> float:
    """Returns the share of true items among the R highest scores; R is the number of true items.

    Ties count against the attacker.

    Args:
      scores: float [N].
      truth: bool [N].

    Raises:
      DataError: no item is true.
    """
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth, bool)
    if not truth.any():
        raise DataError("no scored item is true")
    order = np.lexsort((truth, -scores))
    return float(truth[order[: truth.sum()]].mean())


def first_inputs_of_decoder(decoder: Network, params: PyTree, tokens) -> np.ndarray:
    """Returns the first layer's inputs [N, D] for tokens [N], which do not depend on their places.

    Args:
      params: of the base; adapters do not change these inputs.
    """
    config = decoder.config
    x = (
        np.asarray(params["embed"]["embedding"], np.float64)[np.asarray(tokens)]
        * config.embed_scale
    )
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * (np.asarray(params["layers"]["attention_norm"]["scale"][0]) + config.centred_norms)


def first_inputs(encoder: Network, params: PyTree, tokens, places: int) -> np.ndarray:
    """Returns the first layer's inputs [places, N, D] for tokens [N] at each of `places` positions.

    Raises:
      ConfigError: the network is not an encoder with a table of positions.
    """
    if "position_embed" not in params:
        raise ConfigError(
            "the inputs of the first layer are known only for encoders with a table of positions"
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
    """Returns the gradients of the first layer's query, key and value projections, those that are
    trained: of whole matrices [D, 3 D], of the A of adapters [D, 3 rank]."""
    met = update["layers"]["attention"]
    parts = [met[name] for name in ("q_proj", "k_proj", "v_proj") if name in met]
    first = [np.asarray(part.get("kernel", part.get("lora_a"))[0]) for part in parts]
    return np.concatenate(first, axis=1)


def rounding(before: PyTree) -> float:
    """Returns the largest singular value of the rounding errors in `first_gradient` of an update.

    An update is a difference of float32 parameters, each rounded by up to 2^-24 of its size. Errors of
    a matrix [D, E] with standard deviation s have singular values up to about s (√D + √E).

    Args:
      before: the parameters before the update.
    """
    weights = first_gradient(before)
    deviation = 2.0**-24 / np.sqrt(3) * np.sqrt(np.square(weights).mean())
    return float(deviation * np.sqrt(weights.shape).sum())


def placed(
    gradient: np.ndarray, inputs: np.ndarray, tolerance: float = 1e-6, noise: float = 0.0
) -> np.ndarray:
    """Returns the part [...] of each input outside of the gradient's column space, in [0, 1].

    It is 0 for inputs that were in the batch.

    Args:
      gradient: [D, E], of matrices that multiply inputs from the right, as from `first_gradient`.
      inputs: [..., D].
      tolerance: singular values below this share of the largest count as rounding errors; for float32
        gradients these are about 1e-8.
      noise: smaller singular values count as rounding errors too; see `rounding`.

    Raises:
      DataError: a gradient of full rank, whose span contains every input.
    """
    u, s, _ = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    basis = u[:, s > max(tolerance * s[0], noise)]
    if basis.shape[1] >= len(gradient):
        raise DataError(
            f"the gradient has full rank {len(gradient)}, so that every token lies in its span: the "
            "batch has as many tokens as the model's width, or the update is not a gradient"
        )
    inside = inputs @ basis
    squares = np.square(inputs).sum(-1)
    return np.sqrt(np.maximum(squares - np.square(inside).sum(-1), 0) / squares)


def matched(task: Task, trainable: PyTree, examples: Sequence, update: PyTree) -> np.ndarray:
    """Returns the cosine [N] between the update and the negative gradient of each single example.

    Args:
      task: a task whose loss is defined for a single example, which excludes in-batch ranking.
      trainable: the parameters with which the client started.

    Raises:
      DataError: the update is zero.
    """
    norm = np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(update)))
    if not norm:
        raise DataError("the update is zero, so it has no direction to compare with")
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
