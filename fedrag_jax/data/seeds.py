"""Named random streams on the host."""

import zlib

import numpy as np

from fedrag_jax.errors import ConfigError


def stream(seed: int, name: str, *ids: int) -> np.random.Generator:
    """Returns an independent generator for each seed, purpose and ids, such as a round or a client.

    A draw does not depend on earlier draws, so a resumed run draws the same numbers.

    Raises:
      ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"{name}: seed must be at least 0, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *ids])
