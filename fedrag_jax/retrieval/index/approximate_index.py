"""Approximate nearest-neighbour search over a corpus with FAISS, on the host."""

from typing import Any

import faiss
import numpy as np

from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.faiss_kinds import FaissKind
from fedrag_jax.retrieval.index.vector_index import HostIndex, finite

FEW = 0.1  # of the vectors may be others for an index to be brought up to date, not built anew
TRAINED_ON = 200_000  # vectors at least, or all there are; a twentieth, if that is more
_AT_ONCE = 65_536  # vectors added together


class ApproximateIndex(HostIndex):
    """An approximate FAISS index and its vectors, which may be memory-mapped.

    A search that finds fewer than k vectors is made again, exactly. If the kind allows it (ivf, pq),
    vectors are replaced in place. A graph of neighbours (hnsw) is rebuilt.
    """

    exact = False

    def __init__(self, vectors: np.ndarray, kind: FaissKind, index=None):
        super().__init__(vectors)
        self.kind = kind
        self._index = self._built() if index is None else index

    def with_vectors(self, vectors: np.ndarray) -> "ApproximateIndex":
        """Returns an index of the same kind over other vectors [N, D].

        If few vectors differ and the kind allows it, a copy of this index is updated; otherwise the
        index is trained and built again.
        """
        if vectors.shape != self._vectors.shape:
            return super().with_vectors(vectors)
        vectors, changed = finite(vectors, "passage"), []
        for start in range(0, len(vectors), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            others = (vectors[part] != self._vectors[part]).any(axis=1)
            changed.append(start + np.flatnonzero(others))
        rows = np.concatenate(changed)
        if len(rows) > FEW * len(vectors) or (len(rows) and not self._updates):
            return super().with_vectors(vectors)
        other = ApproximateIndex(vectors, self.kind, faiss.clone_index(self._index))
        other._update(rows)
        return other

    @property
    def _updates(self) -> bool:
        """Whether vectors can be replaced in place: only in lists with a map from rows to positions."""
        return hasattr(self._index, "update_vectors")

    def _update(self, rows: np.ndarray) -> None:
        """Updates the vectors of some rows, each given once, in the index."""
        fresh = np.ascontiguousarray(self._vectors[rows], np.float32)
        if len(rows):
            self._index.update_vectors(np.asarray(rows, np.int64), fresh)

    def _built(self):
        """Trains the index on a sample, if that is enough, and fills it part by part."""
        count = len(self._vectors)
        drawn = np.random.default_rng(0).permutation(count)[: max(TRAINED_ON, count // 20)]
        sample = self._vectors if len(drawn) == count else self._vectors[np.sort(drawn)]
        index = self.kind.trained(sample.astype(np.float32, copy=False), count)
        for start in range(0, count, _AT_ONCE):
            part = self._vectors[start : start + _AT_ONCE]
            index.add(np.ascontiguousarray(part, np.float32))
        return index

    def _settings(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        how = self.kind.parameters(self._index, k)
        scores, rows = self._index.search(queries, k, params=how)
        # FAISS tells -1 where the lists that are looked into hold fewer than k, or where the graph does
        # not lead to k vectors, as among many equal ones.
        few = np.flatnonzero((rows < 0).any(axis=1))
        if few.size:
            rows[few], scores[few] = FaissIndex(self._vectors).search(queries[few], k)
        order = np.lexsort((rows, -scores))
        scores, rows = (np.take_along_axis(x, order, 1) for x in (scores, rows))
        return rows.astype(np.int32), scores

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        super()._replace(rows, vectors)
        if self._updates:
            self._update(np.unique(rows))
        else:
            self._index = self._built()
