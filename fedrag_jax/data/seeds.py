"""Named random streams on the host, and random keys on the device."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from fedrag_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax


def stream(seed: int, name: str, *ids: int) -> np.random.Generator:
    """Returns an independent generator for each seed, purpose and ids, such as a round or a client.

    A draw does not depend on earlier draws, so a resumed run draws the same numbers.

    Raises:
      ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"{name}: seed must be at least 0, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *ids])


def key_of(seed: int) -> jax.Array:
    """Returns the random key of a signed seed of 64 bits.

    JAX reads only the lower 32 bits; the upper ones are folded in if the seed needs them.
    """
    import jax  # not needed by those that only split data

    key = jax.random.key(seed)
    if -(2**31) <= seed < 2**32:
        return key
    return jax.random.fold_in(key, np.uint32((seed >> 32) & 0xFFFFFFFF))
