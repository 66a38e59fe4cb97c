"""Causal decoders with one architecture: Llama, Mistral, Qwen, Gemma 3.

arXiv 2302.13971, 2310.06825, 2505.09388, 2503.19786.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.errors import ConfigError
from fedrag_jax.models import fused
from fedrag_jax.models.layers import (
    Embed,
    Linear,
    RMSNorm,
    attend,
    looking_from,
    run_stack,
    stack,
    take_rows,
    wide_type,
)
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.models.network import PerLayer
from fedrag_jax.models.rotary import Scaling, rope_of, rotate


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
      head_dim: size of a head; it may differ from hidden_size / num_heads.
      max_positions: maximum number of tokens of the model.
      qkv_bias, o_bias, mlp_bias: whether these linear layers have a bias.
      qk_norm: whether queries and keys are normalised, per head, before the rotation.
      windows: the window of each layer in tokens, including the current one; 0 for no limit. Empty if
        no layer has a limit.
      activation: activation of the gate, "silu" or "gelu_tanh".
      embed_scale: factor of token embeddings.
      attention_scale: factor of products of queries and keys; default: head_dim^-1/2.
      centred_norms: whether norms multiply by 1 + scale instead of scale.
      post_norms: whether the outputs of attention and MLP are normalised too.
      local_rope_theta: `rope_theta` of layers with a window, which ignore `rope_scaling`; default: that
        of all layers.
      family: model_type of its `config.json`.
      unroll: unroll the layers instead of looping (for counting operations).
      remat: what the backward pass recomputes: "selective" keeps the outputs of linear layers and
        recomputes the rest; "full" recomputes whole layers, which takes a third longer and uses the
        least memory; "none" keeps everything.
      attention: implementation of attention for long rows, one of `fused.ATTENTION`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    activation: str = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None
    centred_norms: bool = False
    post_norms: bool = False
    local_rope_theta: float | None = None
    family: str = "llama"
    # How it is computed is no part of what a model is (`fingerprint`).
    unroll: bool = dataclasses.field(default=False, repr=False)
    remat: str = dataclasses.field(default="selective", repr=False)
    attention: str = dataclasses.field(default="auto", repr=False)


class Cache(NamedTuple):
    """Keys and values already computed.

    Attributes:
      keys, values: [L, G, B, S, E], or `PerLayer` of [G * B, S, E].
      mask: bool [B, S], True for tokens, False for padding and free places.
      length: int32 scalar, the number of used places of S.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array


class Decoder(nnx.Module):
    """Computes hidden states of tokens; `logits` is separate, so that it is computed only where
    needed."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        inside = lora.widths(config.num_layers) if lora else {}
        self.layers = stack(config.num_layers, lambda r: _Layer(config, inside, rngs=r), rngs)
        self.norm = _norm(config, config.hidden_size)
        if not config.tie_embeddings:
            size = config.hidden_size, config.vocab_size
            outside = lora.widths(None) if lora else {}
            self.lm_head = Linear("lm_head", *size, outside, rngs=rngs)

    def __call__(
        self,
        tokens,
        positions,
        mask,
        cache: Cache | None = None,
        read=None,
        segments=None,
        room: int = 0,
    ):
        """Returns hidden states after the last norm.

        A token attends to the earlier tokens in the array that are not padding, within the window of a
        layer.

        Args:
          tokens, positions: int [B, T]; positions are those of the rotary embedding.
          mask: [B, T], 0 or False for padding, on either side.
          cache: the cache of earlier tokens; it must have room for the new ones.
          read: int [B, M], the positions whose hidden states are returned; default: all. The last layer
            computes no others, which saves a good part of a small model's time.
          segments: int [B, T], numbers of texts that share a row: a token attends only to tokens of the
            same number.
          room: creates a cache with this many places, at least T; these tokens take the first places.

        Returns:
          [B, T, D], or [B, M, D] at `read`; with a cache, also the cache with these tokens added; with
          `room`, also the new cache.

        Raises:
          ConfigError: segments together with a cache.
        """
        config, t = self.config, tokens.shape[1]
        mask, start = mask.astype(bool), None
        if cache is not None:
            if segments is not None:
                raise ConfigError("segments are read whole, not continued: leave the cache out")
            start = cache.length
            mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
        seen = self._seen(mask, t, start, segments)

        hidden = self._embedded(tokens)
        rope = rope_of(config, positions, hidden.dtype)

        def step(layer, carry, index, read=None):
            hidden, *kept = carry
            cached = (*kept, index, start) if kept else None
            hidden, *kept = layer(hidden, rope(index), seen(index), cached, read)
            if cache is not None:
                return (hidden, *kept), None
            return (hidden,), [_padded(x, 2, room) for x in kept] if room else None

        carry = (hidden,) if cache is None else (hidden, cache.keys, cache.values)
        last = None if read is None else lambda *inputs: step(*inputs, read=read)
        (hidden, *kept), made = run_stack(self.layers, step, carry, config, last)
        hidden = self.norm(hidden)
        if room:
            return hidden, Cache(*made, _padded(mask, 1, room), jnp.int32(t))
        return hidden if cache is None else (hidden, Cache(*kept, mask, start + t))

    def attention(self, tokens, positions, mask, read) -> jax.Array:
        """Returns the contribution of each token to the tokens at `read`: float32 [B, M, T].

        This is alpha_n |v_n|, the attention to token n times the norm of its value, averaged over heads
        and layers. Arguments are as for a call without a cache.
        """
        config, t = self.config, tokens.shape[1]
        seen = self._seen(mask.astype(bool), t)
        hidden = self._embedded(tokens)
        rope = rope_of(config, positions, hidden.dtype)

        def step(layer, carry, index):
            hidden, total = carry
            normed = layer.attention_norm(hidden)
            total = total + layer.attention.mass(normed, rope(index), seen(index), read)
            return (layer(hidden, rope(index), seen(index), None, None)[0], total), None

        none = jnp.zeros((*read.shape, t), jnp.float32)
        (_, total), _ = run_stack(self.layers, step, (hidden, none), config)
        return total / config.num_layers

    def _seen(self, mask, t: int, start=None, segments=None):
        """Returns the function of a layer's number that returns the mask of `attend` for `t` tokens.

        Args:
          start: number of cached tokens before them; None for a whole row without a cache.
        """
        config, s = self.config, mask.shape[1]
        if start is None:
            dtype, packed = self.embed.embedding[...].dtype, segments is not None
            if kernel := fused.kernel_of(config.attention, dtype, t, config.head_dim, packed):
                return fused.sight(kernel, mask, segments, causal=True, windows=config.windows)
        rows = jnp.arange(t) if start is None else start + jnp.arange(t)
        back = (rows[:, None] - jnp.arange(s)[None])[None]
        visible = (back >= 0) & mask[:, None]
        if segments is not None:
            visible &= segments[:, :, None] == segments[:, None]
        limits = jnp.array([w or s for w in config.windows])
        return lambda index: visible & (back < limits[index]) if config.windows else visible

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        wide = wide_type(hidden)
        if self.config.tie_embeddings:
            table = self.embed.embedding[...]
            return jnp.matmul(hidden, table.T, preferred_element_type=wide)
        return self.lm_head(hidden, wide)

    def _embedded(self, tokens):
        hidden = self.embed(tokens)
        if self.config.embed_scale == 1:
            return hidden
        return hidden * jnp.asarray(self.config.embed_scale, hidden.dtype)


class _Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        size, after = config.hidden_size, config.post_norms
        self.attention_norm = _norm(config, size)
        self.attention = _Attention(config, lora, rngs=rngs)
        self.attention_post_norm = _norm(config, size) if after else lambda x: x
        self.mlp_norm = _norm(config, size)
        self.mlp = _MLP(config, lora, rngs=rngs)
        self.mlp_post_norm = _norm(config, size) if after else lambda x: x

    def __call__(self, hidden, rope, visible, cache, read):
        normed = self.attention_norm(hidden)
        attended, *cache = self.attention(normed, rope, visible, cache, read)
        hidden = take_rows(hidden, read) + self.attention_post_norm(attended)
        return hidden + self.mlp_post_norm(self.mlp(self.mlp_norm(hidden))), *cache


class _Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        d, e, bias = config.hidden_size, config.head_dim, config.qkv_bias
        heads, kv = config.num_heads * e, config.num_kv_heads * e
        self.head_dim = e
        self.q_proj = Linear("q_proj", d, heads, lora, bias=bias, rngs=rngs)
        self.k_proj = Linear("k_proj", d, kv, lora, bias=bias, rngs=rngs)
        self.v_proj = Linear("v_proj", d, kv, lora, bias=bias, rngs=rngs)
        self.o_proj = Linear("o_proj", heads, d, lora, bias=config.o_bias, rngs=rngs)
        self.q_norm = _norm(config, e) if config.qk_norm else lambda q: q
        self.k_norm = _norm(config, e) if config.qk_norm else lambda k: k
        scale = config.attention_scale
        self.stretch = 1.0 if scale is None else scale * e**0.5  # `attend` multiplies by e^-1/2

    def __call__(self, x, rope, visible, cache, read):
        v = self._heads(self.v_proj(x)).transpose(2, 0, 1, 3)
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), rope).transpose(2, 0, 1, 3)
        x, *rope = (take_rows(array, read) for array in (x, *rope))
        q = self._queries(x, rope)
        kept = k, v
        if cache is not None:
            keys, values, layer, start = cache
            keys, k = _extended(keys, k, layer, start)
            values, v = _extended(values, v, layer, start)
            kept = keys, values
        return self.o_proj(attend(q, k, v, looking_from(visible, read))), *kept

    def mass(self, x, rope, visible, read):
        """alpha_n |v_n|, averaged over heads: float32 [B, M, T]."""
        v, k = self._heads(self.v_proj(x)), rotate(self.k_norm(self._heads(self.k_proj(x))), rope)
        x, *rope = (take_rows(array, read) for array in (x, *rope))
        q = self._queries(x, rope)
        q, groups = q * self.head_dim**-0.5, k.shape[2]
        q = q.reshape(*q.shape[:2], groups, -1, self.head_dim)
        scores = jnp.einsum("bmghe,btge->bghmt", q, k).astype(jnp.float32)
        visible = looking_from(visible, read)[:, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30))
        lengths = jnp.linalg.norm(v.astype(jnp.float32), axis=-1)
        mass = jnp.einsum("bghmt,btg->bmt", weights, lengths)
        return mass / (groups * q.shape[3])

    def _queries(self, x, rope):
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        return q if self.stretch == 1 else q * jnp.asarray(self.stretch, q.dtype)

    def _heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class _MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = _ACTIVATIONS[config.activation]
        self.gate_proj = Linear("gate_proj", d, f, lora, bias=bias, rngs=rngs)
        self.up_proj = Linear("up_proj", d, f, lora, bias=bias, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, lora, bias=bias, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


# The tanh approximation is jax's default.
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def _padded(x, axis: int, length: int):
    """Pads an axis with zeros up to a length."""
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _extended(kept, new, layer, start):
    """Adds new keys or values [G, B, T, E] of a layer; returns those of all layers and of that
    layer."""
    if isinstance(kept, PerLayer):
        # In the shape that attention multiplies with: where it is another one, XLA on a CPU writes both
        # and copies the cache four times to do so.
        groups, rows, tokens, size = new.shape
        new = new.reshape(-1, tokens, size)
        one = jax.lax.dynamic_update_slice(kept.layers[layer], new, (0, start, 0))
        return kept.replaced(layer, one), one.reshape(groups, rows, -1, size)
    kept = jax.lax.dynamic_update_slice(kept, new[None], (layer, 0, 0, start, 0))
    return kept, kept[layer]


def _norm(config, size):
    return RMSNorm(size, config.norm_epsilon, centred=config.centred_norms)
