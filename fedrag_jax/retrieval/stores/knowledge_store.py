"""What every store of passages promises: search, add, replace, delete, refresh, save.

Training looks at a corpus that stands still, by row (`retrieval.index`). A system in use asks a
`KnowledgeStore`, which changes under it: passages go by their ids, searches and changes come from many
threads, and every search sees all of a change or nothing of it.
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
    """A store somewhere else that does not answer, or refuses."""


class KnowledgeStore(PassageSource):
    """Passages by their ids, searched by vectors, by words or by both.

    Attributes:
      dimension: of its vectors; None where words alone are searched.
      read_only: whether it lies memory-mapped on disk and refuses changes.
    """

    read_only: bool = False

    def __init__(self):
        super().__init__()
        self._lock = threading.RLock()  # held for the moment of a change, and while a search lasts

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def add(self, passages: Sequence[Passage], vectors=None) -> None:
        """Takes in passages that are not there yet, with vectors [N, D] of unit length.

        Raises:
          DataError: an id that is there already or comes twice, a vector that is not finite; nothing is
            added.
          ConfigError: vectors that are missing, too few or of another dimension.
        """
        passages, vectors = self._checked(passages, vectors)
        with self._changing:
            if known := self._known([p.id for p in passages]):
                raise DataError(
                    f"passage id {min(known)!r} is in the store already: replace it, or give the new "
                    "passage an id of its own"
                )
            self._change(passages, vectors)

    def replace(self, passages: Sequence[Passage], vectors=None) -> None:
        """Puts passages, and vectors [N, D], in the place of those with their ids.

        Raises:
          DataError: an id that is not there or comes twice, a vector that is not finite; nothing is
            replaced.
          ConfigError: as `add`.
        """
        passages, vectors = self._checked(passages, vectors)
        with self._changing:
            self._require([p.id for p in passages])
            self._change(passages, vectors)

    def delete(self, ids: Iterable[str]) -> None:
        """Takes passages out.

        Raises:
          DataError: an id that is not there; nothing is deleted.
        """
        ids = [*dict.fromkeys(strings(ids, "ids"))]
        with self._changing:
            self._require(ids)
            if ids:
                self._require_writable()
                with self._lock:
                    self._delete(ids)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with those ids, in their order.

        Raises:
          DataError: an id that is not there.
        """
        ids = strings(ids, "ids")
        with self._lock:
            self._require(ids)
            return self._get(ids)

    def search(self, questions: Sequence[str], vectors=None, k: int = 5) -> list[list[Found]]:
        """For each question the k passages that fit best, best first; all there are if they are fewer.

        Equal scores are ordered by id. Approximate indexes may find less than there is.

        Args:
          vectors: [Q, D] of the questions, for stores that have a dimension.

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
        """Gives every passage a new vector, as after training the document encoder.

        Searches see the old vectors until all of the new are there, and then the new alone. Changes
        wait.

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
        """A store of the same kind and settings without passages.

        Raises:
          ConfigError: one that lies elsewhere.
        """
        settings = self._settings()
        if self.lies_elsewhere(settings):
            raise ConfigError(
                f"a store of kind {self.kind!r} that lies elsewhere ({self.place(settings)}) is not "
                "made a second time: use one that lies in memory"
            )
        return type(self)(**settings)

    # --- of each kind --------------------------------------------------------------------------

    @abc.abstractmethod
    def _known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are there."""

    @abc.abstractmethod
    def _get(self, ids: Sequence[str]) -> list[Passage]: ...

    @abc.abstractmethod
    def _put(self, passages: Sequence[Passage], vectors: np.ndarray | None) -> None:
        """Adds or replaces, all or nothing."""

    @abc.abstractmethod
    def _delete(self, ids: Sequence[str]) -> None: ...

    @contextmanager
    def _fresh(
        self, passages: Sequence[Passage], vectors: np.ndarray
    ) -> Iterator[Callable[[], None]]:
        """Of a kind with vectors: makes ready for new ones, and gives what puts them in place."""
        raise NotImplementedError
        yield

    @abc.abstractmethod
    def _search(
        self, questions: Sequence[str], vectors: np.ndarray | None, k: int
    ) -> list[list[Found]]:
        """The k best of each question, or more, in any order; the store is not empty."""

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
                raise DataError(f"passage id {passage.id!r} comes twice; ids must be unique")
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
        """What keeps a passage out of a store of this kind; "" if nothing does."""
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
