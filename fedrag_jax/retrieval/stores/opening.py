"""Opens a saved store, of whatever kind it is."""

import json
import pathlib

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.retrieval.stores.device import DeviceKnowledge
from fedrag_jax.retrieval.stores.faiss_kinds import FaissKnowledge
from fedrag_jax.retrieval.stores.fusion import HybridStore
from fedrag_jax.retrieval.stores.knowledge import KnowledgeStore, StoreUnreachable
from fedrag_jax.retrieval.stores.mcp import MCPStore
from fedrag_jax.retrieval.stores.postgres import PostgresStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.reranked import RerankedStore
from fedrag_jax.retrieval.stores.source import DATA, FORMAT, SETTINGS, PassageSource
from fedrag_jax.retrieval.stores.words import WordStore

KINDS = {
    store.kind: store
    for store in (
        FaissKnowledge,
        DeviceKnowledge,
        WordStore,
        HybridStore,
        RerankedStore,
        QdrantStore,
        PostgresStore,
        MCPStore,
    )
}


def open_store(
    path: str | pathlib.Path, memory_map: bool = False, elsewhere: bool = False
) -> PassageSource:
    """The store that `PassageSource.save` left in a folder.

    Args:
      memory_map: leave vectors and passages on disk and read what a search needs. Such a store cannot
        be changed; kinds that do not lie in the folder are opened as ever.
      elsewhere: follow a folder that tells of a server, of another folder or of a command. Say so of
        folders that you trust: questions will go there, and QDRANT_API_KEY, libpq's password or what
        FEDRAG_MCP_... holds with them; the command is run.

    Raises:
      ConfigError: a library that its kind needs is missing.
      StoreUnreachable: it lies elsewhere, and nobody answers there.
      CheckpointError: no store is there, it is damaged, or of a kind or format that is not known.
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
        settings, kind = saved["settings"], KINDS[saved["kind"]]
        if kind.lies_elsewhere(settings) and not elsewhere:
            raise CheckpointError(
                f"{folder}: the passages lie elsewhere ({kind.place(settings)}): if you trust that "
                "place with questions, with this user's key or password for it, and with what it runs "
                "on this machine, open the store with elsewhere=True"
            )
        if DATA.fullmatch(folder.parent.name) and not issubclass(kind, KnowledgeStore):
            # Whoever agreed to another place that a hybrid names has not agreed to this one.
            raise CheckpointError(
                f"{folder}: a store of kind {saved['kind']!r} is no part of another"
            )
        return kind._load(folder / saved["data"], settings, memory_map)
    except (CheckpointError, StoreUnreachable, ConfigError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} holds no store ({error!r}); save one there first"
        ) from error
