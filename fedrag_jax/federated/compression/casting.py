"""Casting to 16-bit numbers, rounded to the nearest."""

import functools

import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.compression.codec import Codec

TYPES = ("bfloat16", "float16")


@functools.cache
def cast(dtype: str) -> Codec:
    """Sends numbers as "bfloat16" or "float16"; values beyond the type's range are clipped.

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
