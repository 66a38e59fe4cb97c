"""Settings and pooling shared by all encoders: how texts are read and reduced to one vector."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.errors import ConfigError
from fedrag_jax.models.layers import Linear, wide_type

POOLING = ("mean", "cls", "lasttoken")
SIMILARITIES = ("cosine", "dot", "euclidean")
PROJECTION = "projection_"  # what the parameters of projections begin with
ACTIVATIONS = {"Identity": lambda x: x, "Tanh": jnp.tanh}


class Projection(NamedTuple):
    """A linear layer after the pooled vector, with `size` outputs.

    Attributes:
      activation: one of `ACTIVATIONS`.
      bias: whether it has a bias.
    """

    size: int
    activation: str = "Identity"
    bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """The use of an encoder, part of its config, which also has `hidden_size` and `max_positions`.

    Attributes:
      max_length: maximum tokens of a text; longer texts are truncated.
      pooling: "mean" of the token vectors, or the vector of the first ("cls") or last ("lasttoken").
      projections: linear layers after the pooled vector, in order.
      normalize: whether vectors are normalised to length 1.
      similarity: similarity that the vectors were trained for, one of `SIMILARITIES`.
      query_prompt, document_prompt: prefixes of questions and passages.
      lower_case: whether texts are converted to lower case, whatever the tokenizer does.
    """

    pooling: str = "mean"
    projections: tuple[Projection, ...] = ()
    normalize: bool = True
    similarity: str = "cosine"
    query_prompt: str = ""
    document_prompt: str = ""
    lower_case: bool = False
    max_length: int = 512

    def __post_init__(self):
        if self.pooling not in POOLING:
            raise ConfigError(f"encoder pooling must be one of {POOLING}, got {self.pooling!r}")
        if unknown := {p.activation for p in self.projections} - {*ACTIVATIONS}:
            raise ConfigError(
                f"encoder activations must be among {[*ACTIVATIONS]}, got {sorted(unknown)}"
            )
        if self.similarity not in SIMILARITIES:
            raise ConfigError(
                f"encoder similarity must be one of {SIMILARITIES}, got {self.similarity!r}"
            )
        if not 1 <= self.max_length <= self.max_positions:
            raise ConfigError(
                f"encoder max_length must be between 1 and max_positions {self.max_positions}, "
                f"got {self.max_length}"
            )

    @property
    def size(self) -> int:
        """Size of the encoder's vectors."""
        return self.projections[-1].size if self.projections else self.hidden_size

    @property
    def dimension(self) -> int:
        """Dimension of the searched vectors."""
        return self.size + 2 * (self.similarity == "euclidean")

    def question_text(self, question: str) -> str:
        """Returns the text of a question for the encoder; its prompt counts towards `max_length`."""
        return self._read(self.query_prompt + question)

    def passage_text(self, text: str) -> str:
        """Returns the text of a passage for the encoder."""
        return self._read(self.document_prompt + text)

    def _read(self, text: str) -> str:
        return text.lower() if self.lower_case else text


def projection_name(number: int) -> str:
    """Returns the parameter name of a projection."""
    return f"{PROJECTION}{number}"


def add_projections(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Adds the projections of its config to an encoder."""
    size = module.config.hidden_size
    for i, p in enumerate(module.config.projections):
        name = projection_name(i)
        setattr(module, name, Linear(name, size, p.size, {}, bias=p.bias, rngs=rngs))
        size = p.size


def pooled(module: nnx.Module, hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns vectors of texts, [B, D], in at least float32.

    Args:
      module: an encoder with its projections.
      hidden: output of its last layer, [B, T, D].
      mask: [B, T], 0 or False for padding, on the right.
    """
    config, mask = module.config, mask.astype(jnp.float32)
    hidden = hidden.astype(wide_type(hidden))
    if config.pooling == "cls":
        vectors = hidden[:, 0]
    elif config.pooling == "lasttoken":
        last = jnp.maximum(mask.sum(1) - 1, 0).astype(jnp.int32)
        vectors = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    else:
        mask = mask.astype(hidden.dtype)[..., None]
        vectors = (hidden * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
    for i, projection in enumerate(config.projections):
        vectors = getattr(module, projection_name(i))(vectors)
        vectors = ACTIVATIONS[projection.activation](vectors)
    if config.normalize:
        square = jnp.square(vectors).sum(-1, keepdims=True)
        vectors = vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    return vectors
