"""Approximate nearest-neighbour search over a corpus with FAISS, on the host."""

from typing import Any

import numpy as np

from fedrag_jax.retrieval.index.faiss_kinds import FaissKind
from fedrag_jax.retrieval.index.vector_index import VectorIndex

TRAINED_ON = 200_000  # vectors at least, or all there are; a twentieth, if that is more
_AT_ONCE = 65_536  # vectors added together


class ApproximateIndex(VectorIndex):
    """An index of one of FAISS' kinds beside the vectors, which may be memory-mapped.

    Some vectors are replaced in place where the kind allows it (ivf, pq). A graph of neighbours (hnsw)
    is built anew.
    """

    exact = False

    def __init__(self, ids, vectors: np.ndarray, kind: FaissKind):
        super().__init__(ids, vectors)
        self.kind, self._vectors, self._own = kind, vectors, False
        self._index = self._built()

    def _built(self):
        """Trained on a sample, where that is enough, and filled part by part."""
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

    @property
    def vectors(self) -> np.ndarray:
        """float32 or float16 [N, D], a read-only view: `replace` is the way to change them."""
        view = self._vectors.view()
        view.flags.writeable = False
        return view

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        how = self.kind.parameters(self._index, k)
        scores, rows = self._index.search(queries, k, params=how)
        # Where the lists that are looked into hold fewer than k, FAISS tells -1: all lists do.
        few = np.flatnonzero((rows < 0).any(axis=1))
        if few.size:
            everything = FaissKind(self.kind.index, probes=len(self), effort=len(self))
            scores[few], rows[few] = self._index.search(
                queries[few], k, params=everything.parameters(self._index, k)
            )
        order = np.lexsort((rows, -scores))
        scores, rows = (np.take_along_axis(x, order, 1) for x in (scores, rows))
        return rows.astype(np.int32), scores

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        if not self._own:
            self._vectors, self._own = np.array(self._vectors), True
        self._vectors[rows] = vectors
        if hasattr(self._index, "update_vectors"):  # lists with a map of what lies where
            # The last of a row that is there twice, as in the vectors.
            last = {int(row): place for place, row in enumerate(rows)}
            places = [*last.values()]
            fresh = np.ascontiguousarray(vectors[places], np.float32)
            self._index.update_vectors(np.array([*last], np.int64), fresh)
        else:
            self._index = self._built()
