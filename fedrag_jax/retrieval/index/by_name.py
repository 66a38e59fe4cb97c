"""Kinds of index by name, with their options.

| name | search | update of some vectors |
|---|---|---|
| `flat` | exact, by FAISS on the host; vectors may be memory-mapped | in place |
| `device` | exact, on JAX's devices, each with a share of the vectors | in place |
| `ivf` | the lists nearest to a question | in place |
| `pq` | the same, with vectors compressed to a few bytes | in place |
| `hnsw` | along a graph of neighbours | rebuilt |
| `qdrant`, `postgres` | in an external store, for corpora too large for one machine | in place |

The options of ivf, pq and hnsw are those of `faiss_kinds.FaissKind`; stores have `at` and `collection`.
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
from fedrag_jax.retrieval.index.store_index import StoreIndex
from fedrag_jax.retrieval.index.vector_index import MakesIndex
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
from fedrag_jax.retrieval.stores.registry import KINDS, new_store, store_class

EXACT = {"flat": FaissIndex, "device": DeviceIndex}
OPTIONS = {
    "ivf": ("lists", "probes"),
    "pq": ("lists", "probes", "codes"),
    "hnsw": ("neighbours", "effort"),
}
ELSEWHERE = ("qdrant", "postgres")
INDEXES = (*EXACT, *OPTIONS, *ELSEWHERE)


def index_kind(
    name: str, options: Mapping[str, Any] = MappingProxyType({}), where: str = "index"
) -> MakesIndex:
    """Returns the function that builds an index of a kind.

    Args:
      where: where the name and its options were given, for messages.

    Raises:
      ConfigError: an unknown name or option, or an option out of its range.
    """
    if name not in INDEXES:
        raise ConfigError(f"{where}: unknown kind of index {name!r}; choose among {[*INDEXES]}")
    known = KINDS[name].options if name in ELSEWHERE else OPTIONS.get(name, ())
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(
            f"{where}: unknown options {unknown} of index {name!r}; choose among {[*known]}"
        )
    if name in EXACT:
        return EXACT[name].build
    if name in ELSEWHERE:
        if lacking := [option for option in KINDS[name].needed if option not in options]:
            raise ConfigError(
                f"{where}: index {name!r} needs the option {lacking[0]!r}, its location"
            )
        return functools.partial(_in_store, name, options)
    try:
        kind = dataclasses.replace(FaissKind(name), **options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return functools.partial(ApproximateIndex.build, kind=kind)


def lies_elsewhere(name: str, options: Mapping[str, Any]) -> bool:
    """Returns whether an index is in a service or in a folder of its own."""
    return name in ELSEWHERE and store_class(KINDS[name].saved).lies_elsewhere(
        {"location": options.get("at")}
    )


def saved_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of an index for a file: without passwords, and with the whole path of a
    folder, so that they hold in any working directory."""
    options = dict(options)
    if lies_elsewhere(name, options):
        options["at"] = store_class(KINDS[name].saved).public(options["at"])
    return options


def _in_store(name: str, options: Mapping[str, Any], vectors) -> StoreIndex:
    store = new_store(name, vectors.shape[1], **options)
    assert isinstance(store, KnowledgeStore)
    return StoreIndex.build(vectors, store=store)
