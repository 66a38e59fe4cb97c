"""Bidirectional encoders, pooled: BERT, RoBERTa, MPNet (arXiv 1810.04805, 1907.11692, 2004.09297)."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from fedrag_jax.errors import ConfigError
from fedrag_jax.models import fused
from fedrag_jax.models.layers import Embed, LayerNorm, Linear, attend, run_stack, stack
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.models.pooling import Use, add_projections, pooled


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Use):
    """Shape of an encoder; for the use of its last layer, see `Use`.

    Attributes:
      max_positions: maximum input length.
      first_position: row of the position table for the first token.
      type_vocab_size: rows of the table of token types; 0 for none.
      relative_buckets: number of buckets for the distance between two tokens; each has a bias per head
        that all layers add to their scores; 0 for none.
      family: model_type of its `config.json`.
      unroll: unroll the layers instead of looping (for counting operations).
      remat, attention: as in `DecoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    first_position: int = 0
    type_vocab_size: int = 2
    relative_buckets: int = 0
    norm_epsilon: float = 1e-12
    family: str = "bert"
    # How it is computed is no part of what a model is (`fingerprint`).
    unroll: bool = dataclasses.field(default=False, repr=False)
    remat: str = dataclasses.field(default="none", repr=False)
    attention: str = dataclasses.field(default="auto", repr=False)


class Encoder(nnx.Module):
    """Computes one vector per text."""

    def __init__(self, config: EncoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.config, d = config, config.hidden_size
        self.embed = Embed(config.vocab_size, d, rngs=rngs)
        self.position_embed = Embed(config.first_position + config.max_positions, d, rngs=rngs)
        if config.type_vocab_size:
            self.type_embed = Embed(config.type_vocab_size, d, rngs=rngs)
        if config.relative_buckets:
            self.distance_embed = Embed(config.relative_buckets, config.num_heads, rngs=rngs)
        self.embed_norm = LayerNorm(d, config.norm_epsilon)
        inside = lora.widths(config.num_layers) if lora else {}
        self.layers = stack(config.num_layers, lambda r: _Layer(config, inside, rngs=r), rngs)
        add_projections(self, rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns pooled vectors, float32 [B, D].

        Args:
          tokens: int [B, T], padded on the right; all of token type 0.
          mask: [B, T], 0 or False for padding.

        Raises:
          ConfigError: T is larger than the position table.
        """
        return pooled(self, self.hidden(tokens, mask), mask)

    def hidden(
        self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """Returns the output of the last layer, [B, T, D].

        Args:
          types: int [B, T], token types; all 0 if None.
        """
        config, t = self.config, tokens.shape[1]
        if t > config.max_positions:
            raise ConfigError(
                f"encoder input of {t} tokens does not fit the {config.max_positions} positions "
                "of this model; cut texts at config.max_length"
            )
        first = config.first_position
        hidden = self.embed(tokens) + self.position_embed.embedding[first : first + t][None]
        if config.type_vocab_size:
            first_type = self.type_embed.embedding[:1][None]
            hidden = hidden + (first_type if types is None else self.type_embed(types))
        bias = None
        if config.relative_buckets:
            bias = self.distance_embed(distance_buckets(t, config.relative_buckets))
            bias = bias.transpose(2, 0, 1)  # [H, T, T]
        visible = self._seen(mask.astype(bool))

        def step(layer, hidden, _):
            return layer(hidden, visible, bias), None

        return run_stack(self.layers, step, self.embed_norm(hidden), config)[0]

    def _seen(self, mask):
        """Returns the mask of `attend`."""
        config, t = self.config, mask.shape[1]
        dtype, size = self.embed.embedding[...].dtype, config.hidden_size // config.num_heads
        kernel = fused.kernel_of(config.attention, dtype, t, size)
        if kernel is None or config.relative_buckets:
            return mask[:, None]
        return fused.sight(kernel, mask, causal=False)(0)


def distance_buckets(t: int, buckets: int, longest: int = 128) -> np.ndarray:
    """Returns the bucket of the distance between each pair of `t` tokens, int [t, t] (T5, 1910.10683).

    Half of the buckets are for following tokens. In each half, half of the buckets are for single
    distances, and the others for ranges that grow geometrically up to `longest`.
    """
    ahead = np.arange(t)[None] - np.arange(t)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(ahead)
    scaled = np.log(np.maximum(distance, 1) / exact) / np.log(longest / exact) * (half - exact)
    far = np.minimum(exact + scaled.astype(int), half - 1)
    return half * (ahead > 0) + np.where(distance < exact, distance, far)


class _Layer(nnx.Module):
    """Post-norm: the norm comes after the residual sum."""

    def __init__(self, config: EncoderConfig, lora, *, rngs):
        self.attention = _Attention(config, lora, rngs=rngs)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = _MLP(config, lora, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_epsilon)

    def __call__(self, hidden, visible, bias):
        hidden = self.attention_norm(hidden + self.attention(hidden, visible, bias))
        return self.mlp_norm(hidden + self.mlp(hidden))


class _Attention(nnx.Module):
    def __init__(self, config: EncoderConfig, lora, *, rngs):
        d, self.heads = config.hidden_size, config.num_heads
        self.q_proj = Linear("q_proj", d, d, lora, bias=True, rngs=rngs)
        self.k_proj = Linear("k_proj", d, d, lora, bias=True, rngs=rngs)
        self.v_proj = Linear("v_proj", d, d, lora, bias=True, rngs=rngs)
        self.o_proj = Linear("o_proj", d, d, lora, bias=True, rngs=rngs)

    def __call__(self, x, visible, bias):
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (x.transpose(2, 0, 1, 3) for x in (k, v))
        return self.o_proj(attend(q, k, v, visible, bias))


class _MLP(nnx.Module):
    def __init__(self, config: EncoderConfig, lora, *, rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.up_proj = Linear("up_proj", d, f, lora, bias=True, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, lora, bias=True, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=False))
