"""Numbers of sixteen bits, rounded to the nearest."""

import functools

import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.compression.codec import Codec

TYPES = ("bfloat16", "float16")


@functools.cache
def cast(dtype: str) -> Codec:
    """Sends "bfloat16" or "float16"; numbers beyond the largest of a type are sent as that one.

    Raises:
      ConfigError: another type.
    """
    if dtype not in TYPES:
        raise ConfigError(f"cast: dtype is one of {TYPES}, got {dtype!r}")
    largest = float(jnp.finfo(dtype).max)

    def encode(vector, key):
        return jnp.clip(vector, -largest, largest).astype(dtype)

    def decode(message, size, key):
        return message.astype(jnp.float32)

    return Codec(dtype, encode, decode)
