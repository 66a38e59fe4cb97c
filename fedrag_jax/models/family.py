"""Reading and writing checkpoints of one model_type."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedrag_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Family:
    """Reads and writes checkpoints of one model_type.

    Attributes:
      module: `Decoder` or `Encoder`.
      read: function from a `config.json` to the network's config; raises CheckpointError for an option
        that the network does not support.
      write: the inverse of `read`; transformers can read its output too.
      names: map from parameter path to tensor name; `{}` is the layer. A `kernel` is stored transposed.
      prefix: prefix of every name in some checkpoints, which is removed.
      ignored: pattern of tensors to ignore.
    """

    module: type
    read: Callable[..., Any]
    write: Callable[[Any], dict]
    names: dict[str, str]
    prefix: str
    ignored: str


def only(hf: dict, **options) -> None:
    """Refuses values of options that change the function and that the network does not support."""
    for option, supported in options.items():
        if hf.get(option, supported) != supported:
            raise CheckpointError(
                f"config.json: {option} {hf[option]!r} is not supported; supported: {supported!r}"
            )
