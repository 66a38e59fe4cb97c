"""Exact nearest-neighbour search over a corpus with FAISS."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from fedrag_jax.errors import CheckpointError, ConfigError, DataError


class FaissStore:
    """Passage ids and their vectors, searched by inner product (cosine, if they are normalised).

    Row i of everything belongs to passage `ids[i]`; rows never move.
    """

    def __init__(self, ids: tuple[str, ...], index: faiss.IndexFlatIP):
        self.ids = ids
        self._index = index

    @classmethod
    def build(cls, ids: Sequence[str], vectors: np.ndarray) -> "FaissStore":
        """Indexes `vectors` [N, D] under `ids` [N].

        Raises:
          DataError: no passages, an id twice, not one vector per id, or a vector not finite.
        """
        ids = tuple(ids)
        if not ids:
            raise DataError("the corpus is empty: a store needs at least one passage")
        if len(set(ids)) < len(ids):
            twice = next(i for i, count in Counter(ids).items() if count > 1)
            raise DataError(f"passage id {twice!r} occurs twice; ids must be unique")
        vectors = _finite(vectors, "passage")
        if len(vectors) != len(ids):
            raise DataError(f"{len(ids)} passage ids but {len(vectors)} vectors; give one per id")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return cls(ids, index)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        return self._index.d

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D], a view into the index: `replace` is the way to change it."""
        view = self._storage()
        view.flags.writeable = False
        return view

    def search(self, query_vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k passages of largest inner product with each query, best first.

        Equal scores are ordered by row, also where the cut at k falls among them.

        Args:
          query_vectors: float [Q, D].

        Returns:
          rows int32 [Q, k] and scores float32 [Q, k].

        Raises:
          ConfigError: k below 1 or above the corpus, or queries of another dimension.
          DataError: a query vector that is not finite.
        """
        if not 1 <= k <= len(self):
            raise ConfigError(f"k must be between 1 and the corpus' {len(self)} passages, got {k}")
        queries = self._same_dimension(_finite(query_vectors, "query"))
        if not len(queries):
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
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

    def replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Puts `vectors` [R, D] in the place of those at `rows` int [R]; nothing else is touched.

        Raises:
          ConfigError: a row outside the corpus, not one vector per row, or another dimension.
          DataError: a vector that is not finite.
        """
        rows = np.asarray(rows, np.int64)
        vectors = self._same_dimension(_finite(vectors, "passage"))
        if rows.shape != (len(vectors),):
            raise ConfigError(f"{len(vectors)} vectors for rows of shape {rows.shape}")
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ConfigError(
                f"rows must be between 0 and {len(self) - 1}, got {rows.min()} to {rows.max()}"
            )
        self._storage()[rows] = vectors

    def save(self, path: str | os.PathLike) -> None:
        """Writes ids.json and vectors.npy into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ids.json").write_text(json.dumps(self.ids), encoding="utf-8")
        np.save(folder / "vectors.npy", self.vectors, allow_pickle=False)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FaissStore":
        """Reads what `save` wrote.

        Raises:
          CheckpointError: a file is missing or damaged, or the two do not belong together.
        """
        folder = Path(path)
        try:
            ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
            vectors = np.load(folder / "vectors.npy", allow_pickle=False)
            return cls.build(ids, vectors)
        except (OSError, EOFError, ValueError, TypeError) as error:  # ours are ValueErrors
            raise CheckpointError(
                f"{folder} does not hold a store ({error}); save it again"
            ) from error

    def _storage(self) -> np.ndarray:
        pointer = self._index.get_xb()
        return faiss.rev_swig_ptr(pointer, len(self) * self.dimension).reshape(len(self), -1)

    def _ordered(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._index.search(queries, k)
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _same_dimension(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.shape[1] != self.dimension:
            raise ConfigError(
                f"the store holds vectors of dimension {self.dimension}, got {vectors.shape[1]}; "
                "use the encoder that embedded the corpus, or embed it again"
            )
        return vectors


def _finite(vectors, kind: str) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ConfigError(f"{kind} vectors must be [number, dimension], got shape {vectors.shape}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise DataError(f"{kind} vector {bad[0]} has a value that is not finite; see its encoder")
    return vectors
