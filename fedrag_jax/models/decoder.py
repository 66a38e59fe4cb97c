"""Causal decoders of the Llama family (Touvron et al., arXiv 2302.13971; Llama 3, 2407.21783)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.layers import Embed, Linear, RMSNorm, attend, run_stack, stack, take_rows
from fedrag_jax.models.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary frequencies; names as in `config.json`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
      head_dim: need not be hidden_size / num_heads.
      max_positions: tokens the model was made for.
      unroll: write every layer out instead of looping (for counting operations).
      remat: recompute layers in the backward pass: less memory, and on a CPU less time.
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
    rope_scaling: Llama3Scaling | None = None
    tie_embeddings: bool = False
    unroll: bool = False
    remat: bool = True

    @classmethod
    def from_hf(cls, hf: dict) -> "DecoderConfig":
        """Reads a `config.json` of model_type llama.

        Raises:
          CheckpointError: an option this decoder does not have.
        """
        for option, supported in _ONLY.items():
            if hf.get(option, supported) != supported:
                raise CheckpointError(
                    f"config.json: {option} {hf[option]!r} is not supported; supported: {supported!r}"
                )
        theta, scaling = _read_rope(hf)
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_positions=hf.get("max_position_embeddings", 2048),
            norm_epsilon=hf.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=hf.get("tie_word_embeddings", False),
        )

    def to_hf(self) -> dict:
        """The `config.json` that `from_hf` reads back; rope settings in both places."""
        rope = {"rope_type": "default"}
        if self.rope_scaling:
            rope = {"rope_type": "llama3"} | dataclasses.asdict(self.rope_scaling)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_embeddings,
        } | _ONLY


class Cache(NamedTuple):
    """Keys and values already computed.

    Attributes:
      keys, values: [L, B, S, G, E].
      mask: bool [B, S], which of them are tokens rather than padding or room.
      length: int32 scalar, how many of the S places are taken.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array


class Decoder(nnx.Module):
    """Tokens to hidden states; `logits` is apart, so that it is computed only where needed."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack(config.num_layers, lambda r: _Layer(config, lora, rngs=r), rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tie_embeddings:
            size = config.hidden_size, config.vocab_size
            self.lm_head = Linear("lm_head", *size, lora, rngs=rngs)

    def __call__(self, tokens, positions, mask, cache: Cache | None = None, read=None):
        """Hidden states after the last norm.

        A token looks at the tokens before it in the array that are not padding.

        Args:
          tokens, positions: int [B, T]; positions are those of the rotary embedding.
          mask: [B, T], 0 or False where there is padding, on either side.
          cache: of the tokens before these; `empty_cache` makes one.
          read: int [B, M], the places among the T whose hidden states are wanted; all by default. The
            last layer computes no others, which of a small model is a good part.

        Returns:
          [B, T, D], or [B, M, D] at `read`; with a cache, that and the cache with these tokens added.
        """
        config, t = self.config, tokens.shape[1]
        mask, start = mask.astype(bool), 0
        if cache is not None:
            start = cache.length
            mask = jax.lax.dynamic_update_slice(cache.mask, mask, (0, start))
        rows, columns = start + jnp.arange(t), jnp.arange(mask.shape[1])
        visible = (columns[None] <= rows[:, None])[None] & mask[:, None]

        hidden = self.embed(tokens)
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
        angles = jnp.concatenate([angles, angles], -1)[:, :, None]
        rope = jnp.cos(angles).astype(hidden.dtype), jnp.sin(angles).astype(hidden.dtype)

        def step(layer, carry, index, read=None):
            hidden, *kept = carry
            return layer(hidden, rope, visible, (*kept, index, start) if kept else None, read)

        carry = (hidden,) if cache is None else (hidden, cache.keys, cache.values)
        last = None if read is None else lambda *inputs: step(*inputs, read=read)
        hidden, *kept = run_stack(self.layers, step, carry, config, last)
        hidden = self.norm(hidden)
        return hidden if cache is None else (hidden, Cache(*kept, mask, start + t))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        if self.config.tie_embeddings:
            logits = hidden @ self.embed.embedding[...].T
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Room for `length` tokens in each of `rows` sequences."""
        c, dtype = self.config, self.embed.embedding[...].dtype
        shape = c.num_layers, rows, length, c.num_kv_heads, c.head_dim
        room = jnp.zeros(shape, dtype)
        return Cache(room, room, jnp.zeros((rows, length), bool), jnp.int32(0))


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position, float32 [E / 2] (Su et al., 2104.09864), slowed as in Llama 3.1.

    Wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor are left, between them the two are blended.
    """
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponent
    s = config.rope_scaling
    if s is not None:
        turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / s.factor
    return frequencies.astype(np.float32)


class _Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = _Attention(config, lora, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = _MLP(config, lora, rngs=rngs)

    def __call__(self, hidden, rope, visible, cache, read):
        normed = self.attention_norm(hidden)
        attended, *cache = self.attention(normed, rope, visible, cache, read)
        hidden = take_rows(hidden, read) + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), *cache


class _Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        d, e = config.hidden_size, config.head_dim
        self.head_dim = e
        self.q_proj = Linear("q_proj", d, config.num_heads * e, lora, rngs=rngs)
        self.k_proj = Linear("k_proj", d, config.num_kv_heads * e, lora, rngs=rngs)
        self.v_proj = Linear("v_proj", d, config.num_kv_heads * e, lora, rngs=rngs)
        self.o_proj = Linear("o_proj", config.num_heads * e, d, lora, rngs=rngs)

    def __call__(self, x, rope, visible, cache, read):
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        k = _rotate(k, rope)
        x, visible, *rope = (take_rows(array, read) for array in (x, visible, *rope))
        q = _rotate(self._heads(self.q_proj(x)), rope)
        kept = ()
        if cache is not None:
            keys, values, layer, start = cache
            at = (layer, 0, start, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None], at)
            values = jax.lax.dynamic_update_slice(values, v[None], at)
            k, v, kept = keys[layer], values[layer], (keys, values)
        return self.o_proj(attend(q, k, v, visible)), *kept

    def _heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class _MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, lora, *, rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear("gate_proj", d, f, lora, rngs=rngs)
        self.up_proj = Linear("up_proj", d, f, lora, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, lora, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def _rotate(x, rope):
    """Turns the pairs (i, i + E/2) of each head: the order of Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


# Options that change the function and that this decoder has in one form only.
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _read_rope(hf: dict) -> tuple[float, Llama3Scaling | None]:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` (transformers before 5)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; "
            "supported: 1.0"
        )
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, Llama3Scaling(*(rope[f.name] for f in dataclasses.fields(Llama3Scaling)))
    raise CheckpointError(
        f"config.json: rope type {kind!r} is not supported; supported: 'default', 'llama3'"
    )
