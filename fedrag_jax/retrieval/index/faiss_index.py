"""Exact nearest-neighbour search over a corpus with FAISS."""

import faiss
import numpy as np

from fedrag_jax.retrieval.index.vector_index import VectorIndex


class FaissIndex(VectorIndex):
    """Vectors lie in a flat FAISS index, on the host."""

    def __init__(self, ids: tuple[str, ...], vectors: np.ndarray):
        super().__init__(ids, vectors)
        self._index = faiss.IndexFlatIP(self.dimension)
        self._index.add(vectors)

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D], a view into the index: `replace` is the way to change it."""
        view = self._storage()
        view.flags.writeable = False
        return view

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._ordered(queries, min(k + 1, len(self)))
        # Where the last place is tied with the next, FAISS kept any of the tied: ask for them all.
        undecided = np.flatnonzero(scores[:, k - 1] == scores[:, -1]) if k < len(self) else ()
        scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
        wider = k + 1
        while len(undecided) and wider < len(self):
            wider = min(4 * wider, len(self))
            all_scores, all_rows = self._ordered(queries[undecided], wider)
            scores[undecided], rows[undecided] = all_scores[:, :k], all_rows[:, :k]
            undecided = undecided[all_scores[:, k - 1] == all_scores[:, -1]]
        return rows.astype(np.int32), scores

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._storage()[rows] = vectors

    def _storage(self) -> np.ndarray:
        pointer = self._index.get_xb()
        return faiss.rev_swig_ptr(pointer, len(self) * self.dimension).reshape(len(self), -1)

    def _ordered(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._index.search(queries, k)
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
