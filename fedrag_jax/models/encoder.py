"""Bidirectional encoders of the BERT family (Devlin et al., arXiv 1810.04805), pooled to a vector."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models.layers import Embed, LayerNorm, Linear, attend, run_stack, stack
from fedrag_jax.models.lora import LoraConfig

POOLING = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder and what becomes of its last layer.

    Attributes:
      max_positions: rows of the position table: the longest input there can be.
      max_length: tokens at which texts are cut; what the model was trained for.
      pooling: "mean" of the tokens' vectors, or that of the first token ("cls").
      normalize: vectors of length 1.
      unroll: write every layer out instead of looping (for counting operations).
      remat: recompute layers in the backward pass, to save memory.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    type_vocab_size: int = 2
    norm_epsilon: float = 1e-12
    pooling: str = "mean"
    normalize: bool = True
    max_length: int = 512
    unroll: bool = False
    remat: bool = False

    def __post_init__(self):
        if self.pooling not in POOLING:
            raise ConfigError(f"encoder pooling must be one of {POOLING}, got {self.pooling!r}")
        if not 1 <= self.max_length <= self.max_positions:
            raise ConfigError(
                f"encoder max_length must be between 1 and max_positions {self.max_positions}, "
                f"got {self.max_length}"
            )

    @classmethod
    def from_hf(cls, hf: dict, **sentence) -> "EncoderConfig":
        """Reads a `config.json` of model_type bert.

        Args:
          sentence: `pooling`, `normalize`, `max_length`, which sentence-transformers keeps apart.

        Raises:
          CheckpointError: an option this encoder does not have.
        """
        for option, supported in _ONLY.items():
            if hf.get(option, supported) != supported:
                raise CheckpointError(
                    f"config.json: {option} {hf[option]!r} is not supported; supported: {supported!r}"
                )
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            max_positions=hf.get("max_position_embeddings", 512),
            type_vocab_size=hf.get("type_vocab_size", 2),
            norm_epsilon=hf.get("layer_norm_eps", 1e-12),
            **sentence,
        )

    def to_hf(self) -> dict:
        """The `config.json` that `from_hf` reads back."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_positions,
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.norm_epsilon,
        } | _ONLY


class Encoder(nnx.Module):
    """Tokens to one vector a text."""

    def __init__(self, config: EncoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.config, d = config, config.hidden_size
        self.embed = Embed(config.vocab_size, d, rngs=rngs)
        self.position_embed = Embed(config.max_positions, d, rngs=rngs)
        self.type_embed = Embed(config.type_vocab_size, d, rngs=rngs)
        self.embed_norm = LayerNorm(d, config.norm_epsilon)
        self.layers = stack(config.num_layers, lambda r: _Layer(config, lora, rngs=r), rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Pooled vectors, float32 [B, D].

        Args:
          tokens: int [B, T], padded on the right; all of token type 0.
          mask: [B, T], 0 or False where there is padding.

        Raises:
          ConfigError: T is larger than the position table.
        """
        hidden, mask = self.hidden(tokens, mask), mask.astype(jnp.float32)
        hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        if self.config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = mask.astype(hidden.dtype)[..., None]
            pooled = (hidden * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
        if self.config.normalize:
            square = jnp.square(pooled).sum(-1, keepdims=True)
            pooled = pooled * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return pooled

    def hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """The last layer [B, T, D]."""
        t = tokens.shape[1]
        if t > self.config.max_positions:
            raise ConfigError(
                f"encoder input of {t} tokens does not fit the {self.config.max_positions} positions "
                "of this model; cut texts at config.max_length"
            )
        hidden = self.embed(tokens) + self.position_embed.embedding[:t][None]
        hidden = self.embed_norm(hidden + self.type_embed.embedding[:1][None])
        visible = mask.astype(bool)[:, None]
        return run_stack(self.layers, lambda layer, h, _: layer(h, visible), hidden, self.config)


class _Layer(nnx.Module):
    """Post-norm: the norm comes after the residual sum."""

    def __init__(self, config: EncoderConfig, lora, *, rngs):
        self.attention = _Attention(config, lora, rngs=rngs)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = _MLP(config, lora, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_epsilon)

    def __call__(self, hidden, visible):
        hidden = self.attention_norm(hidden + self.attention(hidden, visible))
        return self.mlp_norm(hidden + self.mlp(hidden))


class _Attention(nnx.Module):
    def __init__(self, config: EncoderConfig, lora, *, rngs):
        d, self.heads = config.hidden_size, config.num_heads
        self.q_proj = Linear("q_proj", d, d, lora, bias=True, rngs=rngs)
        self.k_proj = Linear("k_proj", d, d, lora, bias=True, rngs=rngs)
        self.v_proj = Linear("v_proj", d, d, lora, bias=True, rngs=rngs)
        self.o_proj = Linear("o_proj", d, d, lora, bias=True, rngs=rngs)

    def __call__(self, x, visible):
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v, visible))


class _MLP(nnx.Module):
    def __init__(self, config: EncoderConfig, lora, *, rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.up_proj = Linear("up_proj", d, f, lora, bias=True, rngs=rngs)
        self.down_proj = Linear("down_proj", f, d, lora, bias=True, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.gelu(self.up_proj(x), approximate=False))


# Options that change the function and that this encoder has in one form only.
_ONLY = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
