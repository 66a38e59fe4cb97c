"""Decoders used as encoders: Qwen3-Embedding (arXiv 2506.05176), E5-Mistral (2401.00368)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.models.pooling import Use, add_projections, pooled


@dataclasses.dataclass(frozen=True)
class CausalEncoderConfig(Use, DecoderConfig):
    """Shape of a decoder and its use as an encoder; embeddings are tied, because there are no
    logits."""


class CausalEncoder(Decoder):
    """Computes one vector per text from a decoder's hidden states."""

    def __init__(
        self, config: CausalEncoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs
    ):
        super().__init__(config, lora, rngs=rngs)
        add_projections(self, rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Pooled vectors, float32 [B, D], of tokens int [B, T] padded on the right."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return pooled(self, super().__call__(tokens, positions, mask), mask)
