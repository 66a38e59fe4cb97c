"""A training index in an external store, Qdrant or PostgreSQL, for very large corpora."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.index.vector_index import HostIndex
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore

_AT_ONCE = 10_000  # vectors sent together
_DIGITS = 10  # of a row, so that equal scores are in the order of rows, too


class StoreIndex(HostIndex):
    """Vectors in a store, under their row numbers and without their texts.

    The store must be empty, or filled by an index of the same size; then its vectors are replaced.

    Args:
      store: a store with vectors.

    Raises:
      ConfigError: a store with foreign passages.
    """

    exact = False

    def __init__(self, vectors: np.ndarray, store: KnowledgeStore):
        super().__init__(vectors)
        self.store = store
        held = len(store)
        if held not in (0, len(self)):
            raise ConfigError(
                f"the store holds {held:,} passages, which are not these {len(self):,}: choose another "
                "collection, or empty it"
            )
        put = store.replace if held else store.add
        for rows in _parts(len(self)):
            put(_passages(rows), np.asarray(vectors[rows.start : rows.stop], np.float32))

    def _settings(self) -> dict[str, Any]:
        return {"store": self.store}

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = self.store.search([""] * len(queries), queries, k)
        if least := [len(some) for some in found if len(some) < k]:
            raise DataError(
                f"the store found {min(least)} of {k} requested passages: configure it to search "
                "more of its vectors"
            )
        rows = [[int(f.passage.id) for f in some] for some in found]
        scores = [[f.score for f in some] for some in found]
        return np.array(rows, np.int32), np.array(scores, np.float32)

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        super()._replace(rows, vectors)
        changed = np.unique(rows)
        for some in _parts(len(changed)):
            part = changed[some.start : some.stop]
            self.store.replace(_passages(part.tolist()), self._vectors[part].astype(np.float32))


def _parts(count: int) -> Iterator[range]:
    for start in range(0, count, _AT_ONCE):
        yield range(start, min(start + _AT_ONCE, count))


def _passages(rows: Iterable[int]) -> Sequence[Passage]:
    return [Passage(f"{row:0{_DIGITS}}", "", "") for row in rows]
