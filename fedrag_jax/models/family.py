"""How checkpoints of one model_type are read and written."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedrag_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one model_type are read and written.

    Attributes:
      module: `Decoder` or `Encoder`.
      read: the network's config of a `config.json`; raises CheckpointError at an option that this
        network does not have.
      write: what `read` reads back, and transformers too.
      names: parameter path to tensor name; `{}` is the layer. A `kernel` is stored transposed.
      prefix: what some checkpoints put before every name, and we leave out.
      ignored: pattern of tensors that take no part.
    """

    module: type
    read: Callable[..., Any]
    write: Callable[[Any], dict]
    names: dict[str, str]
    prefix: str
    ignored: str


def only(hf: dict, **options) -> None:
    """Refuses options that change the function and that the network has in one form only."""
    for option, supported in options.items():
        if hf.get(option, supported) != supported:
            raise CheckpointError(
                f"config.json: {option} {hf[option]!r} is not supported; supported: {supported!r}"
            )
