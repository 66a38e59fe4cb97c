"""The interface of all stores: search, add, replace, delete, refresh, save.

Training uses a fixed corpus, by row (`retrieval.index`). A deployed system searches a `KnowledgeStore`,
which can change at any time: passages are identified by ids, searches and changes come from many
threads, and every search sees either all of a change or none of it.
"""

import abc
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np

from fedrag_jax.data.examples import Passage, half_character
from fedrag_jax.errors import ConfigError, DataError, FedragError
from fedrag_jax.retrieval.index.vector_index import finite
from fedrag_jax.retrieval.stores.passage_source import Found, PassageSource, strings

Embed = Callable[[Sequence[Passage]], np.ndarray]


class StoreUnreachable(FedragError):
    """An external store does not answer, or refuses."""


class KnowledgeStore(PassageSource):
    """Passages by id, searched by vectors, by words or by both.

    Attributes:
      dimension: dimension of the vectors; None if only words are searched.
      read_only: whether the store is memory-mapped on disk and refuses changes.
    """

    read_only: bool = False

    def __init__(self):
        super().__init__()
        self._lock = threading.RLock()  # held for the moment of a change, and while a search lasts

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def add(self, passages: Sequence[Passage], vectors=None) -> None:
        """Adds new passages with vectors [N, D], as `RAGSystem.embed` returns them.

        Raises:
          DataError: an existing or repeated id, or a vector that is not finite; nothing is added.
          ConfigError: vectors that are missing, too few or of another dimension.
        """
        passages, vectors = self._checked(passages, vectors)
        with self._changing:
            if known := self._known([p.id for p in passages]):
                raise DataError(
                    f"passage id {min(known)!r} is in the store already: replace it, or give the new "
                    "passage another id"
                )
            self._change(passages, vectors)

    def replace(self, passages: Sequence[Passage], vectors=None) -> None:
        """Replaces the passages with the same ids, and their vectors [N, D].

        Raises:
          DataError: an unknown or repeated id, or a vector that is not finite; nothing is replaced.
          ConfigError: as `add`.
        """
        passages, vectors = self._checked(passages, vectors)
        with self._changing:
            self._require([p.id for p in passages])
            self._change(passages, vectors)

    def delete(self, ids: Iterable[str]) -> None:
        """Deletes passages.

        Raises:
          DataError: an unknown id; nothing is deleted.
        """
        ids = [*dict.fromkeys(strings(ids, "ids"))]
        with self._changing:
            self._require(ids)
            if ids:
                self._require_writable()
                with self._lock:
                    self._delete(ids)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """Returns the passages with these ids, in the same order.

        Raises:
          DataError: an unknown id.
        """
        ids = strings(ids, "ids")
        with self._lock:
            self._require(ids)
            return self._get(ids)

    def search(self, questions: Sequence[str], vectors=None, k: int = 5) -> list[list[Found]]:
        """Returns the k best passages for each question, best first; all passages if there are fewer.

        Equal scores are ordered by id. Approximate indexes may miss passages.

        Args:
          vectors: [Q, D] question vectors, for stores with a dimension.

        Raises:
          ConfigError: k below 1, vectors that are missing, too few or of another dimension.
          DataError: a vector that is not finite.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        questions = strings(questions, "questions")
        vectors = self._fitting(questions, vectors, "question")
        found: list[list[Found]] = [[] for _ in questions]
        undecided, most = [*range(len(questions))], k + 1
        with self._lock:
            while undecided and len(self):
                some = None if vectors is None else vectors[undecided]
                nearest = self._search([questions[i] for i in undecided], some, most)
                for i, candidates in zip(undecided, nearest, strict=True):
                    found[i] = sorted(candidates, key=lambda f: (-f.score, f.passage.id))
                # Where the last that came is as good as the k-th, some that did not may have lower ids.
                undecided = [
                    i
                    for i in undecided
                    if len(found[i]) >= most and found[i][-1].score == found[i][k - 1].score
                ]
                most *= 4
        return [some[:k] for some in found]

    def refresh(self, embed: Embed) -> None:
        """Gives every passage a new vector, for example after training the document encoder.

        Searches see the old vectors until all new ones are computed, and then only the new ones.
        Changes wait.

        Args:
          embed: `embed(passages) -> [N, D]`.

        Raises:
          ConfigError: the store has no vectors, or the new ones are too few or of another dimension.
          DataError: a vector that is not finite.
        """
        if self.dimension is None:
            raise ConfigError(f"a store of kind {self.kind!r} has no vectors to refresh")
        self._require_writable()
        with self._changing:
            passages = [*self.passages()]
            if not passages:
                return
            vectors = self._fitting(passages, embed(passages), "passage")
            with self._fresh(passages, vectors) as commit, self._lock:
                commit()

    @abc.abstractmethod
    def passages(self) -> Iterable[Passage]:
        """All passages, in no particular order."""

    def emptied(self) -> Self:
        """Returns an empty store of the same kind and settings.

        Raises:
          ConfigError: an external store.
        """
        settings = self._settings()
        if self.lies_elsewhere(settings):
            raise ConfigError(
                f"an external store of kind {self.kind!r} ({self.place(settings)}) cannot be "
                "duplicated: use a store in memory"
            )
        return type(self)(**settings)

    # --- of each kind --------------------------------------------------------------------------

    @abc.abstractmethod
    def _known(self, ids: Sequence[str]) -> set[str]:
        """Returns the ids that exist in the store."""

    @abc.abstractmethod
    def _get(self, ids: Sequence[str]) -> list[Passage]: ...

    @abc.abstractmethod
    def _put(self, passages: Sequence[Passage], vectors: np.ndarray | None) -> None:
        """Adds or replaces passages, all or nothing."""

    @abc.abstractmethod
    def _delete(self, ids: Sequence[str]) -> None: ...

    @contextmanager
    def _fresh(
        self, passages: Sequence[Passage], vectors: np.ndarray
    ) -> Iterator[Callable[[], None]]:
        """For kinds with vectors: prepares new vectors, and returns a function that installs them."""
        raise NotImplementedError
        yield

    @abc.abstractmethod
    def _search(
        self, questions: Sequence[str], vectors: np.ndarray | None, k: int
    ) -> list[list[Found]]:
        """Returns the k best passages of each question, or more, in any order; the store is not
        empty."""

    def _change(self, passages, vectors) -> None:
        if passages:
            self._require_writable()
            with self._lock:
                self._put(passages, vectors)

    # --- checks --------------------------------------------------------------------------------

    def _checked(self, passages, vectors) -> tuple[list[Passage], np.ndarray | None]:
        passages, seen = [*passages], set()
        for passage in passages:
            if fault := self._fault(passage):
                raise DataError(f"passage {passage.id!r} {fault}")
            if passage.id in seen:
                raise DataError(f"passage id {passage.id!r} occurs twice; ids must be unique")
            seen.add(passage.id)
        return passages, self._fitting(passages, vectors, "passage")

    def _fitting(self, things: Sequence, vectors, kind: str) -> np.ndarray | None:
        if self.dimension is None:
            return None
        if not len(things):
            return np.empty((0, self.dimension), np.float32)
        if vectors is None:
            raise ConfigError(f"a store of kind {self.kind!r} needs the vectors of a {kind}")
        vectors = finite(vectors, kind)
        if vectors.shape != (len(things), self.dimension):
            raise ConfigError(
                f"{len(things)} {kind}s need vectors [{len(things)}, {self.dimension}], got "
                f"{[*vectors.shape]}; use the encoder that embedded the passages, or embed them again"
            )
        return vectors

    def _fault(self, passage: Passage) -> str:
        """Returns the reason why a store of this kind refuses a passage; "" if it accepts it."""
        for value in dataclasses.astuple(passage):
            if not isinstance(value, str):
                return f"has {value!r} for a text"
            if fault := half_character(value):
                return fault
        return ""

    def _require_writable(self) -> None:
        if self.read_only:
            raise ConfigError(
                "the store was opened memory-mapped and cannot be changed: open it without memory_map"
            )

    def _require(self, ids: Sequence[str]) -> None:
        missing = {*ids} - self._known(ids)
        if missing:
            raise DataError(f"passage id {min(missing)!r} is not in the store")
