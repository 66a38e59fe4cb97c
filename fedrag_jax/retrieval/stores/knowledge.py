"""What every store of passages promises: search, add, replace, delete, refresh, save.

Training looks at a corpus that stands still, by row (`retrieval.store`). A system in use asks a
`KnowledgeStore`, which changes under it: passages go by their ids, searches and changes come from many
threads, and every search sees all of a change or nothing of it.
"""

import abc
import dataclasses
import json
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError, FedragError
from fedrag_jax.retrieval.store import finite

FORMAT = 1
SETTINGS = "store.json"
DATA = re.compile(r"store-data-([1-9]\d{0,8})")  # a folder of ours in the folder of a store
Embed = Callable[[Sequence[Passage]], np.ndarray]


class StoreUnreachable(FedragError):
    """A store somewhere else that does not answer, or refuses."""


class Found(NamedTuple):
    """A passage, and how well it fits: higher is better; of what kind depends on the store."""

    passage: Passage
    score: float


class KnowledgeStore(abc.ABC):
    """Passages by their ids, searched by vectors, by words or by both.

    Attributes:
      kind: its name in a saved folder.
      dimension: of its vectors; None where words alone are searched.
      cosines: whether scores are inner products of vectors.
      read_only: whether it lies memory-mapped on disk and refuses changes.
    """

    kind: ClassVar[str]
    dimension: int | None = None
    cosines: bool = True
    read_only: bool = False

    def __init__(self):
        self._changing = (
            threading.RLock()
        )  # held by whoever changes the store, however long it takes
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
        ids = [*dict.fromkeys(_strings(ids, "ids"))]
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
        ids = _strings(ids, "ids")
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
        questions = _strings(questions, "questions")
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

    # --- on disk ------------------------------------------------------------------------------

    def save(self, path: str | pathlib.Path) -> None:
        """One folder, replaced whole: whoever opens it meanwhile gets the old store or the new one.

        What is there stays until the new is whole. One process at a time may save into a folder.
        """
        folder = pathlib.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with self._changing:
            former = [p for p in folder.iterdir() if DATA.fullmatch(p.name) and p.is_dir()]
            number = 1 + max((int(DATA.fullmatch(p.name)[1]) for p in former), default=0)
            data = folder / f"store-data-{number}"
            data.mkdir()
            try:
                self._save(data)
            except BaseException:
                shutil.rmtree(data, ignore_errors=True)
                raise
            settings = {
                "format": FORMAT,
                "kind": self.kind,
                "settings": self._settings(),
                "data": data.name,
            }
            beside = folder / (SETTINGS + ".tmp")
            beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            beside.replace(folder / SETTINGS)
            for gone in former:
                shutil.rmtree(gone, ignore_errors=True)

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """Whether a saved folder only tells where the passages are: on a server, in another folder."""
        return False

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """Where that is, for people."""
        return str(settings)

    # --- of each kind --------------------------------------------------------------------------

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What `_load` needs to know, as JSON."""

    @abc.abstractmethod
    def _save(self, folder: pathlib.Path) -> None: ...

    @classmethod
    @abc.abstractmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        """What `_save` left in the folder."""

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
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return f"holds half a character ({error.reason}): decode its text as what it is"
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


def _strings(values: Iterable[str], what: str) -> list[str]:
    """A list of them; one string alone would be taken for its letters."""
    if isinstance(values, str):
        raise ConfigError(f"{what} must be a list of strings, got the string {values!r}")
    return [*values]
