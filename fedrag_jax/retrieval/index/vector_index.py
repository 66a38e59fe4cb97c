"""The interface and checks of all indexes: passages and vectors, searched by inner product."""

import abc
from typing import Any, Protocol, Self

import numpy as np

from fedrag_jax.errors import ConfigError, DataError

_AT_ONCE = 65_536  # vectors looked at together


class Index(Protocol):
    """The interface that a `Retriever` needs; `SiloIndex` implements it too."""

    def search(self, query_vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `VectorIndex.search`."""

    def with_vectors(self, vectors: np.ndarray) -> Self:
        """As `VectorIndex.with_vectors`."""


class MakesIndex(Protocol):
    """A function that builds an index, such as `VectorIndex.build`."""

    def __call__(self, vectors: np.ndarray, /) -> "VectorIndex": ...


class VectorIndex(abc.ABC):
    """The vectors of passages by row, searched by inner product (cosine, if normalised).

    Rows never move. Subclasses define where vectors are stored and how they are searched.

    Attributes:
      exact: whether a search compares all vectors.
    """

    exact = True

    def __init__(self, vectors: np.ndarray):
        self._size, self.dimension = vectors.shape

    @classmethod
    def build(cls, vectors: np.ndarray, **settings) -> Self:
        """Indexes `vectors` [N, D] under their row numbers.

        Args:
          settings: settings of the kind of index.

        Raises:
          ConfigError: another shape.
          DataError: no passages, or a vector not finite.
        """
        vectors = finite(vectors, "passage")
        if not len(vectors):
            raise DataError("the corpus is empty: an index needs at least one passage")
        return cls(vectors, **settings)

    def __len__(self) -> int:
        return self._size

    def with_vectors(self, vectors: np.ndarray) -> Self:
        """Returns an index of the same kind over other vectors [N, D]."""
        return self.build(vectors, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """The settings for building an index of this kind."""
        return {}

    def search(self, query_vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k passages of largest inner product with each query, best first; approximate
        indexes compare only some vectors.

        Equal scores are ordered by row, also at the cut after k.

        Args:
          query_vectors: float [Q, D].

        Returns:
          Rows int32 [Q, k] and scores float32 [Q, k].

        Raises:
          ConfigError: k below 1 or above the corpus, or queries of another dimension.
          DataError: a query vector that is not finite.
        """

        require_depth(k, len(self))
        queries = self.fitting(query_vectors, "query").astype(np.float32, copy=False)
        if not len(queries):
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
        return self._search(queries, k)

    def replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Replaces the vectors at `rows` int [R] by `vectors` [R, D]; nothing else changes.

        Raises:
          ConfigError: a row outside the corpus, not one vector per row, or another dimension.
          DataError: a vector that is not finite.
        """
        rows = np.asarray(rows, np.int64)
        vectors = self.fitting(vectors, "passage")
        if rows.shape != (len(vectors),):
            raise ConfigError(f"{len(vectors)} vectors for rows of shape {rows.shape}")
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ConfigError(
                f"rows must be between 0 and {len(self) - 1}, got {rows.min()} to {rows.max()}"
            )
        self._replace(rows, vectors)

    @property
    @abc.abstractmethod
    def vectors(self) -> np.ndarray:
        """float32 [N, D], read-only; change vectors with `replace`."""

    @abc.abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...

    @abc.abstractmethod
    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None: ...

    def fitting(self, vectors: np.ndarray, kind: str) -> np.ndarray:
        """Returns vectors of the index's dimension, checked as by `finite`.

        Raises:
          ConfigError: another shape or dimension.
          DataError: a value that is not finite.
        """
        vectors = finite(vectors, kind)
        if vectors.shape[1] != self.dimension:
            raise ConfigError(
                f"the index holds vectors of dimension {self.dimension}, got {vectors.shape[1]}; "
                "use the encoder that embedded the corpus, or embed it again"
            )
        return vectors


class HostIndex(VectorIndex):
    """An index that searches vectors on the host without copying them, also memory-mapped ones; the
    first replacement copies all of them."""

    def __init__(self, vectors: np.ndarray):
        super().__init__(vectors)
        self._vectors, self._own = vectors, False

    @property
    def vectors(self) -> np.ndarray:
        """float32 or float16 [N, D], a read-only view; change vectors with `replace`."""
        view = self._vectors.view()
        view.flags.writeable = False
        return view

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        if not self._own:
            self._vectors, self._own = np.array(self._vectors), True
        self._vectors[rows] = vectors


def require_depth(k: int, passages: int) -> None:
    """Refuses a k that is larger than the corpus.

    Raises:
      ConfigError: k below 1 or above the corpus.
    """
    if not 1 <= k <= passages:
        raise ConfigError(f"k must be between 1 and the corpus' {passages} passages, got {k}")


def finite(vectors, kind: str) -> np.ndarray:
    """Returns `vectors` as float32 [number, dimension]; float16 stays float16.

    Raises:
      ConfigError: another shape.
      DataError: a value that is not finite.
    """
    half = getattr(vectors, "dtype", None) == np.float16
    vectors = np.ascontiguousarray(vectors, np.float16 if half else np.float32)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ConfigError(f"{kind} vectors must be [number, dimension], got shape {vectors.shape}")
    for start in range(0, len(vectors), _AT_ONCE):
        bad = np.flatnonzero(~np.isfinite(vectors[start : start + _AT_ONCE]).all(axis=1))
        if bad.size:
            raise DataError(
                f"{kind} vector {start + bad[0]} has a value that is not finite; see its encoder"
            )
    return vectors
