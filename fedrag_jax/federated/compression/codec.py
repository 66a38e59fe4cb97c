"""The type `Codec`, and messages of whole pytrees.

A message consists of packed arrays, exactly as they would be sent; its size is the size of its arrays.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedrag_jax.federated.algorithm import PyTree, by_kind

Message = Any


class Encode(Protocol):
    """Encodes a vector as a message."""

    def __call__(self, vector: jax.Array, key: jax.Array, /) -> Message:
        """Returns the message for float32 [n], a pytree of arrays.

        Args:
          key: random key, which the receiver knows too.
        """


class Decode(Protocol):
    """Decodes a message to a vector."""

    def __call__(self, message: Message, size: int, key: jax.Array, /) -> jax.Array:
        """Returns the decoded vector, float32 [size]."""


class Codec(NamedTuple):
    """A way to send a vector.

    Attributes:
      feedback: whether the error of a message must be added to the next one, as for top-k, which is
        biased.
    """

    name: str
    encode: Encode
    decode: Decode
    feedback: bool = False


def encoded(codec: Codec, tree: PyTree, key: jax.Array) -> dict[str, Message]:
    """Encodes each part of a tree as one message; the arrays of a part form one vector."""
    return {
        name: codec.encode(_vector(part), jax.random.fold_in(key, i))
        for i, (name, part) in enumerate(_parts(tree).items())
    }


def decoded(codec: Codec, messages: Mapping[str, Message], like: PyTree, key: jax.Array) -> PyTree:
    """Decodes messages to the shapes and types of `like`."""
    parts = {}
    for i, (name, part) in enumerate(_parts(like).items()):
        leaves, structure = jax.tree.flatten(part)
        size = sum(x.size for x in leaves)
        vector = codec.decode(messages[name], size, jax.random.fold_in(key, i))
        pieces, start = [], 0
        for x in leaves:
            pieces.append(vector[start : start + x.size].reshape(x.shape).astype(x.dtype))
            start += x.size
        parts[name] = jax.tree.unflatten(structure, pieces)
    return parts if isinstance(like, Mapping) else parts["model"]


def message_bytes(codec: Codec, tree: PyTree) -> dict[str, int]:
    """Returns the message bytes for a tree of these shapes, by part and type."""
    return by_kind(
        jax.eval_shape(lambda tree, key: encoded(codec, tree, key), tree, jax.random.key(0))
    )


def _parts(tree: PyTree) -> Mapping[str, PyTree]:
    return tree if isinstance(tree, Mapping) else {"model": tree}


def _vector(tree: PyTree) -> jax.Array:
    flat = [x.reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return jnp.concatenate(flat) if flat else jnp.zeros(0, jnp.float32)
