"""Sends only the largest values, with error feedback.

Sparsified SGD with Memory
    Stich, Cordonnier, Jaggi, NeurIPS 2018, arXiv 1809.07599, Algorithm 1
"""

import functools
import math

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.compression.codec import Codec


@functools.cache
def top_k(fraction: float) -> Codec:
    """Sends the ⌈fraction · n⌉ values of largest magnitude and their positions; the sender keeps the
    other values and adds them to its next message.

    Raises:
      ConfigError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"top_k: fraction must be in (0, 1], got {fraction}")

    def encode(vector, key):
        kept = math.ceil(fraction * vector.size)
        _, places = jax.lax.top_k(jnp.abs(vector), kept)
        small = jnp.uint16 if vector.size <= 2**16 else jnp.uint32
        return {"values": vector[places], "places": places.astype(small)}

    def decode(message, size, key):
        return jnp.zeros(size, jnp.float32).at[message["places"]].set(message["values"])

    return Codec(f"top_k:{fraction:g}", encode, decode, feedback=True)
