"""Federated retrieval: each silo searches its own passages, and the querying party merges the results.

    retriever = Retriever.build(model, world.passages)
    silos = partition(world.passages, dirichlet(alpha=0.1, clients=8)).clients
    retriever = over_silos(retriever, silos, merge="rrf", budget=SearchBudget(silos=2))

The second retriever is used like the first, in training or for answering. If all silos are queried and
results are merged by score, or if there is one silo, it finds the same passages as one index.

The silos receive a question's vector and answer with their best rows and scores. The querying party
fetches the texts of the overall best rows. Under a budget, only the silos with a centroid nearest to
the question are queried; each silo has published a few centroids, found by k-means. A centroid is a
mean of vectors. In a silo with few passages it may equal a single passage's vector, so a silo should
publish far fewer centroids than it has passages to protect.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import faiss
import numpy as np

from fedrag_jax.data.examples import embedding_text
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.vector_index import MakesIndex, VectorIndex, require_depth
from fedrag_jax.retrieval.retriever import Retriever

RRF_K = 60  # Cormack et al. 2009
MERGES = ("score", "rrf")
_ANSWERS = 1_000_000  # rows with their scores that silos may answer at a time


class SearchBudget(NamedTuple):
    """Limits for one question; None is no limit. `QueryTraffic` counts the bytes.

    Attributes:
      silos: maximum number of silos to query.
      passages_per_silo: maximum number of passages that each of them returns.
    """

    silos: int | None = None
    passages_per_silo: int | None = None


UNLIMITED = SearchBudget()


class QueryTraffic(NamedTuple):
    """The traffic of each question in a call, int64 [Q] each; the querying party's own silo is free.

    Attributes:
      silos: number of queried silos.
      query_bytes: bytes of the question's vector, sent to each of them.
      answer_bytes: bytes of the returned rows and scores.
      passage_bytes: UTF-8 bytes of the fetched texts, each passage once.
    """

    silos: np.ndarray
    query_bytes: np.ndarray
    answer_bytes: np.ndarray
    passage_bytes: np.ndarray

    @property
    def total_bytes(self) -> np.ndarray:
        """All bytes, int64 [Q]."""
        return self.query_bytes + self.answer_bytes + self.passage_bytes


class Silo(NamedTuple):
    """One client's corpus rows int64 [n], ascending, and an index over them."""

    rows: np.ndarray
    index: VectorIndex


@dataclasses.dataclass(frozen=True)
class SiloIndex:
    """The index of a `Retriever` over silos. A passage may be in several silos.

    Attributes:
      text_bytes: int64 [N], UTF-8 bytes of the passages.
      centroids: number of vectors that a silo publishes for `budget.silos`, at most its passages.
      merge: "score", or "rrf" for reciprocal rank fusion.
      asker: the querying silo, whose own index is free and not counted by the budget; None for a party
        without passages.
      listen: function called with the `QueryTraffic` of every search.

    Raises:
      ConfigError: an unknown merge or asker, no centroids, or a budget that allows nothing.
    """

    silos: tuple[Silo, ...]
    text_bytes: np.ndarray
    merge: str = "score"
    budget: SearchBudget = UNLIMITED
    centroids: int = 32
    asker: int | None = None
    listen: Callable[[QueryTraffic], None] | None = None

    def __post_init__(self):
        if self.merge not in MERGES:
            raise ConfigError(f"merge must be one of {MERGES}, got {self.merge!r}")
        if self.centroids < 1:
            raise ConfigError(f"centroids must be at least 1, got {self.centroids}")
        for name, most in self.budget._asdict().items():
            if most is not None and most < 1:
                raise ConfigError(
                    f"budget.{name} must be at least 1, got {most}, which allows nothing; "
                    "None is no limit"
                )
        if self.asker is not None and not 0 <= self.asker < len(self.silos):
            raise ConfigError(
                f"asker must be a silo between 0 and {len(self.silos) - 1} or None, got {self.asker}"
            )

    def __len__(self) -> int:
        return len(self.text_bytes)

    @functools.cached_property
    def published(self) -> tuple[np.ndarray, ...]:
        """The published centroids of each silo, float32 [C, D]."""
        return tuple(_centroids(silo.index.vectors, self.centroids) for silo in self.silos)

    @property
    def published_bytes(self) -> int:
        """Bytes of the centroids sent to the querying party, once; 0 if all silos are queried."""
        return sum(self.published[n].nbytes for n in self._others()) if self._chooses() else 0

    def with_vectors(self, vectors: np.ndarray) -> "SiloIndex":
        """Returns the same silos over other vectors [N, D] of the corpus, with new centroids."""
        silos = [Silo(s.rows, s.index.with_vectors(vectors[s.rows])) for s in self.silos]
        return dataclasses.replace(self, silos=tuple(silos))

    def search(self, query_vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ask`; passes the traffic to `listen`."""
        rows, scores, traffic = self.ask(query_vectors, k)
        if self.listen is not None:
            self.listen(traffic)
        return rows, scores

    def ask(self, query_vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, QueryTraffic]:
        """Returns the k best passages of the queried silos, best first.

        Args:
          query_vectors: float [Q, D].

        Returns:
          Corpus rows int32 [Q, k], scores float32 [Q, k] (inner products, also with rank fusion), and
          the traffic.

        Raises:
          ConfigError: k below 1 or above the corpus, queries of another dimension, or a budget that
            allows fewer than k passages.
          DataError: a query vector that is not finite.
        """
        require_depth(k, len(self))
        queries = self.silos[0].index.fitting(query_vectors, "query")
        depths = np.array([self._depth(number, k) for number in range(len(self.silos))])
        # So many questions at a time that memory does not grow with the silos.
        most = self.budget.silos if self._chooses() else len(self.silos)
        width = max(1, _ANSWERS // (k * (most + 1)))
        parts = [self._ask(part, k, depths) for part in _slices(queries, width)]
        rows, scores, traffic = zip(*parts, strict=True)
        spent = (np.concatenate(counts) for counts in zip(*traffic, strict=True))
        return np.concatenate(rows), np.concatenate(scores), QueryTraffic(*spent)

    def _ask(self, queries: np.ndarray, k: int, depths: np.ndarray):
        asked, answers = self._asked(queries, k), []
        for silo, depth, questions in zip(self.silos, depths, asked.T, strict=True):
            (questions,) = np.nonzero(questions)
            if not len(questions) and answers:
                continue
            rows, scores = silo.index.search(queries[questions], int(depth))
            ranks = np.broadcast_to(np.arange(1, depth + 1), rows.shape)
            of = np.broadcast_to(questions[:, None], rows.shape)
            answers.append([x.ravel() for x in (of, silo.rows[rows], scores, ranks)])
        merged = map(np.concatenate, zip(*answers, strict=True))
        rows, scores = fuse(*merged, questions=len(queries), k=k, merge=self.merge)
        return rows, scores, self._traffic(queries, asked, depths, rows)

    def _traffic(self, queries, asked, depths, rows) -> QueryTraffic:
        sent, fetched = asked.copy(), self.text_bytes[rows]
        if self.asker is not None:
            sent[:, self.asker] = False
            fetched[np.isin(rows, self.silos[self.asker].rows)] = 0
        silos = sent.sum(1)
        a_row_and_score = np.dtype(np.int32).itemsize + np.dtype(np.float32).itemsize
        return QueryTraffic(
            silos=silos,
            query_bytes=silos * queries.shape[1] * queries.itemsize,
            answer_bytes=(sent @ depths) * a_row_and_score,
            passage_bytes=fetched.sum(1),
        )

    def _asked(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Returns which question goes to which silo, bool [Q, S].

        These are the nearest silos, except where small ones would leave fewer than k passages in total.
        """
        asked = np.ones((len(queries), len(self.silos)), bool)
        if not self._chooses():
            return asked
        most, others = self.budget.silos, self._others()
        wanted = k - (0 if self.asker is None else self._depth(self.asker, k))
        depths = np.array([self._depth(number, k) for number in others])
        if (there := np.sort(depths)[-most:].sum()) < wanted:
            raise ConfigError(
                f"budget: {most} silos have at most {there} passages, but {wanted} are needed; ask "
                "for fewer, or raise the budget"
            )
        nearness = self._nearness(queries, others)
        asked[:, others] = False
        for to, nearest in zip(asked, np.argsort(-nearness, axis=1, kind="stable"), strict=True):
            to[np.array(others)[_sufficient(nearest, depths, most, wanted)]] = True
        return asked

    def _nearness(self, queries: np.ndarray, others: list[int]) -> np.ndarray:
        """Returns the similarity of each question to the nearest centroid of each other silo, [Q,
        O]."""
        published = [self.published[number] for number in others]
        starts = np.cumsum([0, *map(len, published[:-1])])
        return np.maximum.reduceat(queries @ np.concatenate(published).T, starts, axis=1)

    def _chooses(self) -> bool:
        return self.budget.silos is not None and self.budget.silos < len(self._others())

    def _others(self) -> list[int]:
        return [number for number in range(len(self.silos)) if number != self.asker]

    def _depth(self, number: int, k: int) -> int:
        most = self.budget.passages_per_silo
        if number == self.asker or most is None:
            most = k
        return min(k, most, len(self.silos[number].rows))


def over_silos(
    retriever: Retriever,
    silos: Sequence[np.ndarray],
    index: MakesIndex = FaissIndex.build,
    **settings,
) -> Retriever:
    """Returns the same retriever with an index in which each silo holds and searches some passages.

    `Retriever.vectors` stays complete: the simulation knows all vectors, but no single index does.

    Args:
      silos: corpus rows int [n] of each silo, such as `Partition.clients`.
      index: the kind of index in each silo.
      settings: `merge`, `budget`, `centroids`, `asker`, `listen`, as in `SiloIndex`.

    Raises:
      ConfigError: as `SiloIndex`.
      DataError: an empty silo, a repeated or unknown row in a silo, or a passage in no silo.
    """
    held = [np.sort(np.asarray(rows, np.int64)) for rows in silos]
    _check(held, len(retriever.passages))
    text_bytes = np.array([len(embedding_text(p).encode()) for p in retriever.passages])
    ends = np.cumsum([len(rows) for rows in held])[:-1]
    # One array of all silos' vectors, of which each looks at a part.
    vectors = np.split(retriever.vectors[np.concatenate(held)], ends)
    held = tuple(Silo(rows, index(part)) for rows, part in zip(held, vectors, strict=True))
    return dataclasses.replace(retriever, index=SiloIndex(held, text_bytes, **settings))


def fuse(
    question: np.ndarray,
    row: np.ndarray,
    score: np.ndarray,
    rank: np.ndarray,
    *,
    questions: int,
    k: int,
    merge: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the results of silos; returns rows and scores [Q, k], best first.

    "rrf" is reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, SIGIR): the value of a passage
    is the sum over silos of 1 / (60 + rank), ranks from 1. Equal values are ordered by score, equal
    scores by row.

    Args:
      question, row, score, rank: int, int, float, int [M], one entry per result.

    Raises:
      ConfigError: fewer than k passages for a question.
    """
    if not questions:
        return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
    # A passage that several silos found is there once.
    rows = row.max() + 1
    key, first, same = np.unique(question * rows + row, return_index=True, return_inverse=True)
    (question, row), score = np.divmod(key, rows), score[first]
    worth = score
    if merge == "rrf":
        # Rounded, because the same votes in another order may differ in the last digit.
        worth = np.round(np.bincount(same, 1 / (RRF_K + rank)), 12)
    order = np.lexsort((row, -score, -worth, question))
    counts = np.bincount(question, minlength=questions)
    if counts.min() < k:
        raise ConfigError(
            f"budget: the silos of question {counts.argmin()} have {counts.min()} different "
            f"passages, but k is {k}; ask for fewer, or raise the budget"
        )
    best = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
    return row[best].astype(np.int32), score[best]


def _sufficient(nearest, depths: np.ndarray, most: int, wanted: int) -> list[int]:
    """Returns the first `most` of `nearest` that together have `wanted` passages."""
    if depths[nearest[:most]].sum() >= wanted:
        return [*nearest[:most]]
    chosen = []
    for i in nearest:
        rest = sorted((depths[j] for j in nearest if j not in (*chosen, i)), reverse=True)
        best = depths[[*chosen, i]].sum() + sum(rest[: most - len(chosen) - 1])
        if len(chosen) < most and best >= wanted:
            chosen.append(i)
    return chosen


def _slices(queries: np.ndarray, width: int) -> list[np.ndarray]:
    """Returns slices of at most `width` questions; one slice if there are none."""
    return [queries[start : start + width] for start in range(0, max(len(queries), 1), width)]


def _centroids(vectors: np.ndarray, count: int) -> np.ndarray:
    """Returns centroids of `vectors` [n, D], float32 [min(count, n), D]; unit length if the vectors
    are."""
    unit = np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    # Fewer than 39 points a cluster make FAISS warn, and they are fine here.
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        min(count, len(vectors)),
        niter=10,
        seed=0,
        spherical=bool(unit),
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return kmeans.centroids


def _check(silos: list[np.ndarray], passages: int) -> None:
    if not silos:
        raise DataError("there are no silos; give at least one array of rows")
    for number, rows in enumerate(silos):
        if not len(rows) or rows[0] < 0 or rows[-1] >= passages or not np.diff(rows).all():
            raise DataError(
                f"silo {number}: rows must be between 0 and {passages - 1}, each once, got {rows}"
            )
    if missing := np.setdiff1d(np.arange(passages), np.concatenate(silos)).tolist():
        raise DataError(
            f"passage {missing[0]} and {len(missing) - 1} others are in no silo; "
            "leave them out of the corpus"
        )
