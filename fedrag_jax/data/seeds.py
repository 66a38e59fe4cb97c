"""Random streams of the host, told apart by name."""

import zlib

import numpy as np

from fedrag_jax.errors import ConfigError


def stream(seed: int, name: str, *ids: int) -> np.random.Generator:
    """An independent generator for each seed, purpose and ids, such as a round or a client.

    A draw depends on nothing drawn before it, so a resumed run draws the same.

    Raises:
      ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"{name}: seed must be at least 0, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *ids])
