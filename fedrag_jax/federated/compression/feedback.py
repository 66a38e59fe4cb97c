"""Error feedback: each message includes what earlier messages dropped.

Error Feedback Fixes SignSGD and other Gradient Compression Schemes
    Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv 1901.09847, Algorithm 1

With the error e and the update u, Δ = decode(encode(u + e)) arrives, and the new error is u + e − Δ.
"""

import jax
import jax.numpy as jnp

from fedrag_jax.federated.algorithm import PyTree, wide
from fedrag_jax.federated.compression.codec import Codec, Message, decoded, encoded

LABEL = "compression"  # of the error, in the row of a client


def packed(
    codec: Codec, update: PyTree, left: PyTree, key: jax.Array
) -> tuple[dict[str, Message], PyTree]:
    """Returns the message for an update, and the new error.

    Args:
      left: the error of earlier messages, at first `nothing_left`; () for a codec without feedback.
    """
    if not codec.feedback:
        return encoded(codec, update, key), ()
    # A turn may train only some leaves; the error of the others is kept.
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
    """Returns the tree with its leaves replaced from `leaves`, which may hold more."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path)], tree
    )
