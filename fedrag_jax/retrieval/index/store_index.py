"""A training index in an external store, Qdrant or PostgreSQL, for very large corpora."""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.index.vector_index import HostIndex
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
from fedrag_jax.retrieval.stores.passage_source import Found

Put = Callable[[Sequence[Passage], np.ndarray], None]
_AT_ONCE = 10_000  # vectors sent together
_DIGITS = 10  # of a row, so that equal scores are in the order of rows, too


class StoreIndex(HostIndex):
    """Vectors in a store, under their row numbers and without their texts.

    The store holds the vectors of one index at a time; each row names that index in its topic. An index
    that finds the rows of another one puts its own vectors back and searches again, so refreshed
    retrievers share a store. Each row names in its title the vectors that the store was first filled
    with: a run that is resumed may fill it again, a run over another corpus may not.

    Args:
      store: a store with vectors, empty or filled by an index over `vectors`.
      origin: the title of the rows; default: a hash of `vectors`. `with_vectors` passes it on.

    Raises:
      ConfigError: a store with other passages.
    """

    exact = False

    def __init__(self, vectors: np.ndarray, store: KnowledgeStore, origin: str = ""):
        super().__init__(vectors)
        self.store = store
        self._origin, self._name = origin or _hash(vectors), uuid.uuid4().hex
        held = len(store)
        if held and (held != len(self) or _first(store).title != self._origin):
            raise ConfigError(
                f"the {store.kind} store holds {held:,} passages, which are not these {len(self):,}: "
                "choose another collection, or empty it"
            )
        self._fill(store.replace if held else store.add)

    def _settings(self) -> dict[str, Any]:
        return {"store": self.store, "origin": self._origin}

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with self.store._changing:  # no index of this process may write in between
            found = self._found(queries, k)
            if not self._own_rows(found):
                self._fill(self.store.replace)
                found = self._found(queries, k)
        if not self._own_rows(found):
            raise DataError(
                f"another process writes to the {self.store.kind} store while this one searches it: "
                "give each process a collection of its own"
            )
        rows = [[int(f.passage.id) for f in some] for some in found]
        scores = [[f.score for f in some] for some in found]
        return np.array(rows, np.int32), np.array(scores, np.float32)

    def _found(self, queries: np.ndarray, k: int) -> list[list[Found]]:
        found = self.store.search([""] * len(queries), queries, k)
        if least := [len(some) for some in found if len(some) < k]:
            raise DataError(
                f"the store found {min(least)} of {k} requested passages: configure it to search "
                "more of its vectors"
            )
        return found

    def _own_rows(self, found: list[list[Found]]) -> bool:
        return all(f.passage.topic == self._name for some in found for f in some)

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        super()._replace(rows, vectors)
        with self.store._changing:
            # If the rows are another index's, the next search puts back all of this one's.
            if _first(self.store).topic == self._name:
                changed = np.unique(rows)
                for some in _parts(len(changed)):
                    self._put(self.store.replace, changed[some.start : some.stop])

    def _fill(self, put: Put) -> None:
        with self.store._changing:
            for rows in _parts(len(self)):
                self._put(put, np.arange(rows.start, rows.stop))

    def _put(self, put: Put, rows: np.ndarray) -> None:
        passages = [Passage(_id(row), self._origin, "", self._name) for row in rows.tolist()]
        put(passages, self._vectors[rows].astype(np.float32))


def _parts(count: int) -> Iterator[range]:
    for start in range(0, count, _AT_ONCE):
        yield range(start, min(start + _AT_ONCE, count))


def _id(row: int) -> str:
    return f"{row:0{_DIGITS}}"


def _first(store: KnowledgeStore) -> Passage:
    """Returns row 0, or an empty passage if the store was not filled by an index."""
    return store.get([_id(0)])[0] if store._known([_id(0)]) else Passage("", "", "")


def _hash(vectors: np.ndarray) -> str:
    digest = hashlib.sha256(repr(vectors.shape).encode())
    for rows in _parts(len(vectors)):
        digest.update(np.ascontiguousarray(vectors[rows.start : rows.stop], np.float32))
    return digest.hexdigest()[:16]
