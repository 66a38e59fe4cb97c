"""Kinds of index by name, with their options.

| name | search | where some vectors are replaced |
|---|---|---|
| `flat` | exact, by FAISS on the host; vectors may be memory-mapped | in place |
| `device` | exact, on JAX's devices, each with a share of the vectors | in place |
| `ivf` | the lists nearest to a question | in place |
| `pq` | the same, among codes of some bytes a vector | in place |
| `hnsw` | along a graph of neighbours | built anew |

Options of the last three are those of `faiss_kinds.FaissKind`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.index.approximate_index import ApproximateIndex
from fedrag_jax.retrieval.index.device_index import DeviceIndex
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.faiss_kinds import FaissKind
from fedrag_jax.retrieval.index.vector_index import MakesIndex

EXACT = {"flat": FaissIndex, "device": DeviceIndex}
OPTIONS = {
    "ivf": ("lists", "probes"),
    "pq": ("lists", "probes", "codes"),
    "hnsw": ("neighbours", "effort"),
}
INDEXES = (*EXACT, *OPTIONS)


def index_kind(
    name: str, options: Mapping[str, Any] = MappingProxyType({}), where: str = "index"
) -> MakesIndex:
    """What makes an index of a kind.

    Args:
      where: of the name and its options, for messages.

    Raises:
      ConfigError: an unknown name or option, an option out of its range.
    """
    if name not in INDEXES:
        raise ConfigError(f"{where}: unknown kind of index {name!r}; choose among {[*INDEXES]}")
    known = OPTIONS.get(name, ())
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(
            f"{where}: unknown options {unknown} of index {name!r}; choose among {[*known]}"
        )
    if name in EXACT:
        return EXACT[name].build
    try:
        kind = dataclasses.replace(FaissKind(name), **options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return functools.partial(ApproximateIndex.build, kind=kind)
