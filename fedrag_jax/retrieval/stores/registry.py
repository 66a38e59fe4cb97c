"""The kinds of stores, one row each, and functions that create and open stores."""

import importlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore, StoreUnreachable
from fedrag_jax.retrieval.stores.passage_source import DATA, FORMAT, SETTINGS, PassageSource


class Kind(NamedTuple):
    """A kind of store.

    Attributes:
      about: a description for users.
      saved: `PassageSource.kind`, its name in a saved folder.
      where: "module:class" in this package, imported on demand because libraries are extras.
      new: `new(class, dimension, **options) -> PassageSource`: creates an empty store; None for kinds
        that consist of other stores or are external.
      options, needed: names of the options of `new`, and of the required ones.
    """

    about: str
    saved: str
    where: str
    new: Callable[..., PassageSource] | None = None
    options: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()


def _hybrid(store, dimension: int, language: str = "") -> PassageSource:
    return store([new_store("flat", dimension), new_store("bm25", dimension, language=language)])


FAISS, BM25 = "faiss_store:FaissStore", "bm25:BM25Store"
KINDS = {
    "flat": Kind("exact (the default)", "faiss", FAISS, lambda store, d: store(d)),
    "ivf": Kind("approximate, inverted lists", "faiss", FAISS, lambda store, d: store(d, "ivf")),
    "hnsw": Kind("approximate, graph", "faiss", FAISS, lambda store, d: store(d, "hnsw")),
    "pq": Kind("approximate, compressed vectors", "faiss", FAISS, lambda store, d: store(d, "pq")),
    "device": Kind(
        "exact on the accelerator", "device", "device_store:DeviceStore", lambda store, d: store(d)
    ),
    "bm25": Kind(
        "by words", "bm25", BM25, lambda store, d, language="": store(language), ("language",),
    ),
    "hybrid": Kind(
        "flat and bm25, fused by rank", "hybrid", "hybrid:HybridStore", _hybrid, ("language",),
    ),
    "qdrant": Kind(
        "Qdrant, in a folder or on a server", "qdrant", "qdrant:QdrantStore",
        lambda store, d, at, collection="fedrag": store(collection, d, at),
        ("at", "collection"), ("at",),
    ),
    "postgres": Kind(
        "PostgreSQL with pgvector", "postgres", "postgres:PostgresStore",
        lambda store, d, at, collection="fedrag": store(at, collection, d),
        ("at", "collection"), ("at",),
    ),
    "reranked": Kind(
        "another, ordered by a cross-encoder", "reranked", "reranked:RerankedStore"
    ),
    "mcp": Kind("a tool of an MCP server", "mcp", "mcp:MCPStore"),
}  # fmt: skip
NEW = tuple(name for name, kind in KINDS.items() if kind.new)  # kinds that are made by name


def store_class(saved: str) -> type[PassageSource]:
    """Returns the class of a kind by its name in a saved folder.

    Raises:
      KeyError: an unknown name.
    """
    where = {kind.saved: kind.where for kind in KINDS.values()}[saved]
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def new_store(name: str, dimension: int, **options: Any) -> PassageSource:
    """Creates an empty store.

    Args:
      name: the kind, one of `NEW`.
      dimension: dimension of its vectors.
      options: options of the kind.

    Raises:
      ConfigError: an unknown kind, an unknown or missing option, or a missing library.
    """
    if name not in NEW:
        raise ConfigError(f"unknown store {name!r}; choose among {[*NEW]}")
    kind, new = KINDS[name], KINDS[name].new
    assert new is not None
    for option in options:
        if option not in kind.options:
            others = [other for other in NEW if option in KINDS[other].options]
            raise ConfigError(
                f"store {name!r} has no option {option!r}; it belongs to {' and '.join(others)}"
                if others
                else f"unknown option {option!r} of store {name!r}; choose among {[*kind.options]}"
            )
    if lacking := [option for option in kind.needed if option not in options]:
        raise ConfigError(f"store {name!r} needs the option {lacking[0]!r}, its location")
    return new(store_class(kind.saved), dimension, **options)


def open_store(
    path: str | pathlib.Path, memory_map: bool = False, elsewhere: bool = False
) -> PassageSource:
    """Opens the store that `PassageSource.save` wrote to a folder.

    Args:
      memory_map: leave vectors and passages on disk and read them on demand. Such a store cannot be
        changed. External stores ignore this option.
      elsewhere: allow the folder to refer to a server, another folder or a command. Use it only for
        folders that you trust: questions are sent there, together with QDRANT_API_KEY, libpq's password
        or the `FEDRAG_MCP_...` variables, and the command is run.

    Raises:
      ConfigError: a library that the kind needs is missing.
      StoreUnreachable: an external store does not answer.
      CheckpointError: no store, a damaged store, or an unknown kind or format.
    """
    folder = pathlib.Path(path)
    while True:
        told = (folder / SETTINGS).read_bytes() if (folder / SETTINGS).is_file() else b""
        try:
            return _opened(folder, told, memory_map, elsewhere)
        except CheckpointError:
            # Saved over meanwhile, or no store.
            if not told or (folder / SETTINGS).read_bytes() == told:
                raise


def _opened(folder: pathlib.Path, told: bytes, memory_map: bool, elsewhere: bool) -> PassageSource:
    try:
        saved = json.loads(told)
        # A name, and nothing that leads out of the folder.
        if not DATA.fullmatch(saved["data"]) or saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r} in {saved['data']!r}")
        settings, kind = saved["settings"], store_class(saved["kind"])
        if kind.lies_elsewhere(settings) and not elsewhere:
            raise CheckpointError(
                f"{folder}: the passages lie elsewhere ({kind.place(settings)}): if you trust that "
                "place with your questions, with your key or password for it, and with the command it "
                "runs on this machine, open the store with elsewhere=True"
            )
        if DATA.fullmatch(folder.parent.name) and not issubclass(kind, KnowledgeStore):
            # Whoever agreed to another place that a hybrid names has not agreed to this one.
            raise CheckpointError(
                f"{folder}: a store of kind {saved['kind']!r} cannot be part of another"
            )
        return kind._load(folder / saved["data"], settings, memory_map)
    except (CheckpointError, StoreUnreachable, ConfigError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} holds no store ({error!r}); save one there first"
        ) from error
