"""Stochastic quantisation to 8 or 4 bits, optionally after a random rotation.

QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding
    Alistarh, Grubic, Li, Tomioka, Vojnovic, NeurIPS 2017, arXiv 1610.02132, sections 3.1 and 3.3
Distributed Mean Estimation with Limited Communication (rotation)
    Suresh, Yu, Kumar, McMahan, ICML 2017, arXiv 1611.00429, section 3

With L = 2^(bits−1) − 1 levels on each side of zero, and s = max |v| / L in each block of values,

    q = ⌊v/s + u⌋, u uniform in [0, 1), which is sent;   ṽ = s q,   E ṽ = v.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.compression.codec import Codec

BLOCK = 256  # values that share a scale: an eighth of a bit for each
WIDTH = 32  # a rotation mixes WIDTH² values
ROUNDING, SIGNS = 0, 1  # what keys are folded with


@functools.cache
def quantised(bits: int) -> Codec:
    """Sends integers of 8 or 4 bits (two per byte), and one float32 scale for every 256 of them.

    Raises:
      ConfigError: a number of bits other than 8 and 4.
    """
    if bits not in (4, 8):
        raise ConfigError(f"quantised: bits must be 8 or 4, got {bits}")
    levels = 2 ** (bits - 1) - 1

    def encode(vector, key):
        blocks = _rows(vector, BLOCK)
        scale = jnp.abs(blocks).max(1, keepdims=True) / levels
        u = jax.random.uniform(jax.random.fold_in(key, ROUNDING), blocks.shape)
        steps = jnp.where(scale > 0, blocks / scale, 0)
        # Rounding errors of v/s must not lead beyond the levels.
        q = jnp.clip(jnp.floor(steps + u), -levels, levels).astype(jnp.int8)
        q = q.reshape(-1)[: vector.size]
        return {"values": q if bits == 8 else _packed(q), "scales": scale[:, 0]}

    def decode(message, size, key):
        q = message["values"] if bits == 8 else _unpacked(message["values"], size)
        blocks = _rows(q.astype(jnp.float32), BLOCK)
        return (blocks * message["scales"][:, None]).reshape(-1)[:size]

    return Codec(f"int{bits}", encode, decode)


@functools.cache
def rotated(bits: int) -> Codec:
    """`quantised` after a random rotation, which spreads single large values over a block.

    Blocks of 1,024 values are multiplied by random signs, which both sides draw, and by the orthonormal
    Hadamard matrix, which is its own inverse. A vector is padded to whole blocks.

    Raises:
      ConfigError: bits other than 8 and 4.
    """
    from scipy.linalg import hadamard  # here, because it takes its time

    plain = quantised(bits)
    half = hadamard(WIDTH).astype(np.float32) / np.sqrt(np.float32(WIDTH))

    def mixed(rows):
        # H of 1,024 is the Kronecker product of two of 32.
        return jnp.einsum("ab,nbc,cd->nad", half, rows.reshape(-1, WIDTH, WIDTH), half)

    def signs(rows, key):
        flips = jax.random.rademacher(jax.random.fold_in(key, SIGNS), (rows.size,), jnp.float32)
        return flips.reshape(rows.shape)

    def encode(vector, key):
        rows = _rows(vector, WIDTH**2)
        return plain.encode(mixed(rows * signs(rows, key)).reshape(-1), key)

    def decode(message, size, key):
        whole = size + -size % WIDTH**2
        rows = mixed(plain.decode(message, whole, key)).reshape(-1, WIDTH**2)
        return (rows * signs(rows, key)).reshape(-1)[:size]

    return Codec(f"rotated_int{bits}", encode, decode)


def _rows(vector: jax.Array, width: int) -> jax.Array:
    """[n] as [ceil(n / width), width], with zeros at the end."""
    return jnp.pad(vector, (0, -vector.size % width)).reshape(-1, width)


def _packed(q: jax.Array) -> jax.Array:
    """int8 [n] from −7 to 7 as uint8 [ceil(n / 2)]."""
    high, low = _rows((q + 8).astype(jnp.uint8), 2).T
    return high << 4 | low


def _unpacked(packed: jax.Array, size: int) -> jax.Array:
    pairs = jnp.stack([packed >> 4, packed & 15], 1)
    return pairs.reshape(-1)[:size].astype(jnp.int8) - 8
