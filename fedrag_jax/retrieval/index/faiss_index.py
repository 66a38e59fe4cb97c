"""Exact nearest-neighbour search over a corpus with FAISS, on the host."""

import faiss
import numpy as np

from fedrag_jax.retrieval.index.vector_index import HostIndex

_AT_ONCE = 65_536  # vectors of half precision that are widened together


class FaissIndex(HostIndex):
    """An exact FAISS search that copies no vectors; float16 vectors are widened block by block."""

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

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._vectors.dtype == np.float32:
            return faiss.knn(queries, self._vectors, k, faiss.METRIC_INNER_PRODUCT)
        best = faiss.ResultHeap(len(queries), k, keep_max=True)
        for start in range(0, len(self), _AT_ONCE):
            block = self._vectors[start : start + _AT_ONCE].astype(np.float32)
            most = min(k, len(block))
            scores, rows = faiss.knn(queries, block, most, faiss.METRIC_INNER_PRODUCT)
            best.add_result(scores, rows + start)
        best.finalize()
        return best.D, best.I

    def _ordered(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._nearest(queries, k)
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
