"""Messages one after another, of which each takes along what those before have left out.

Error Feedback Fixes SignSGD and other Gradient Compression Schemes
    Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv 1901.09847, Algorithm 1

With e what was left out so far and u the update, Δ = decode(encode(u + e)) arrives, and u + e − Δ is
left.
"""

import jax
import jax.numpy as jnp

from fedrag_jax.federated.algorithm import PyTree, wide
from fedrag_jax.federated.compression.codec import Codec, Message, decoded, encoded

LABEL = "compression"  # of what is left out, in the row of a client


def packed(
    codec: Codec, update: PyTree, left: PyTree, key: jax.Array
) -> tuple[dict[str, Message], PyTree]:
    """The message that an update becomes, and what it leaves out.

    Args:
      left: of messages before, as `nothing_left` begins it; () of a codec without feedback.
    """
    if not codec.feedback:
        return encoded(codec, update, key), ()
    # Some turns train some leaves alone: what is left of the others waits.
    whole = jax.tree.map(jnp.add, update, with_leaves(update, left))
    message = encoded(codec, whole, key)
    rest = jax.tree.map(jnp.subtract, whole, decoded(codec, message, whole, key))
    return message, left | leaves_of(rest)


def nothing_left(trainable: PyTree) -> dict[str, jax.Array]:
    """Returns the error-feedback memory before the first message: zeros."""
    return {name: jnp.zeros_like(wide(x)) for name, x in leaves_of(trainable).items()}


def leaves_of(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by path."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def with_leaves(tree: PyTree, leaves: dict) -> PyTree:
    """The tree with the leaves of these paths, which may be of more."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path)], tree
    )
