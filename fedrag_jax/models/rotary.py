"""Rotary position embeddings (Su et al., 2104.09864) and their scalings for long contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary frequencies; names as in `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def slowed(self, frequencies: np.ndarray) -> np.ndarray:
        """Stretches wavelengths longer than original / low_freq_factor by `factor`, keeps those shorter
        than original / high_freq_factor, and interpolates between them."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al., 2306.15595); names as in `config.json`."""

    factor: float

    def slowed(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides all frequencies by the factor."""
        return frequencies / self.factor


Scaling = Llama3Scaling | LinearScaling


def rope_frequencies(config, local: bool = False) -> np.ndarray:
    """Returns radians per position, float32 [E / 2] (Su et al., 2104.09864).

    Args:
      config: a `DecoderConfig`.
      local: whether for layers with a window, if they have a `local_rope_theta`.
    """
    theta = config.local_rope_theta if local else config.rope_theta
    frequencies = theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None and not local:
        frequencies = config.rope_scaling.slowed(frequencies)
    return frequencies.astype(np.float32)


def rope_of(config, positions: jax.Array, dtype):
    """Returns a function from a layer's number to cosine and sine of the angles at positions [B, T],
    each [B, T, 1, E]."""

    def turns(local):
        angles = (
            positions[..., None].astype(jnp.float32) * rope_frequencies(config, local)[None, None]
        )
        angles = jnp.concatenate([angles, angles], -1)[:, :, None]
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    everywhere = turns(local=False)
    if config.local_rope_theta is None:
        return lambda index: everywhere
    near, limited = turns(local=True), jnp.array(config.windows) > 0
    return lambda index: [
        jnp.where(limited[index], a, b) for a, b in zip(near, everywhere, strict=True)
    ]


def rotate(x: jax.Array, rope) -> jax.Array:
    """Rotates the pairs (i, i + E/2) of each head, the order of Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
