"""Codecs by name, for configs and the command line.

| name | codec |
|---|---|
| `float16`, `bfloat16` | `cast` |
| `int8`, `int4` | `quantised` |
| `rotated_int8`, `rotated_int4` | `rotated` |
| `top_k:0.01` | `top_k`, of one value in a hundred |
"""

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.compression.casting import TYPES, cast
from fedrag_jax.federated.compression.codec import Codec
from fedrag_jax.federated.compression.quantisation import quantised, rotated
from fedrag_jax.federated.compression.top_k import top_k

CODECS = {
    **{name: lambda name=name: cast(name) for name in TYPES},
    **{f"int{bits}": lambda bits=bits: quantised(bits) for bits in (8, 4)},
    **{f"rotated_int{bits}": lambda bits=bits: rotated(bits) for bits in (8, 4)},
}


def codec(name: str) -> Codec | None:
    """Returns the codec with that name; None for "", which sends messages unencoded.

    Raises:
      ConfigError: an unknown codec, or an invalid fraction.
    """
    kind, _, fraction = name.partition(":")
    if not name:
        return None
    if name in CODECS:
        return CODECS[name]()
    if kind == "top_k" and (share := _number(fraction)) is not None:
        return top_k(share)
    raise ConfigError(f"no compression {name!r}; choose among {[*CODECS, 'top_k:FRACTION']}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
