"""FAISS indexes of four kinds, on the host: flat (exact), IVF, HNSW and PQ."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import faiss
import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError
from fedrag_jax.retrieval.index.faiss_kinds import FaissKind
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.passage_lines import LINES, MappedLines, read_lines, write_lines

INDEX = "index.faiss"
WASTE = 0.5  # of the rows may be of passages that are gone, before all are written anew


class Rows:
    """An index and the passage of each of its rows. Rows are only appended.

    A deleted or replaced passage keeps its row, which searches skip. This way every kind of index
    supports deletion.
    """

    def __init__(self, index, passages: Sequence[Passage | None] = ()):
        self.index, self.passages = index, passages
        self._skipped = None

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Rows by the ids of present passages; passages on disk are all read for it."""
        return {p.id: row for row, p in enumerate(self.passages) if p is not None}

    def __len__(self) -> int:
        if isinstance(self.passages, MappedLines):
            return len(self.passages) - len(self.passages.gone)
        return len(self.row_of)

    @property
    def wasted(self) -> int:
        """Number of rows of deleted passages."""
        return len(self.passages) - len(self)

    def alive(self) -> Iterator[Passage]:
        """The present passages."""
        return (self.passages[row] for row in self.row_of.values())

    def append(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Adds passages, and drops existing ones with the same ids."""
        first = len(self.passages)
        self.index.add(vectors)
        self.drop([p.id for p in passages if p.id in self.row_of])
        self.passages.extend(passages)
        self.row_of |= {p.id: first + i for i, p in enumerate(passages)}
        self._skipped = None

    def drop(self, ids: Iterable[str]) -> None:
        """Deletes passages."""
        for identifier in ids:
            self.passages[self.row_of.pop(identifier)] = None
        self._skipped = None

    def vectors(self) -> np.ndarray:
        """The vectors [N, D] of `alive`, from the index."""
        whole = self.index.reconstruct_n(0, len(self.passages))
        return whole[[*self.row_of.values()]]

    def selector(self):
        """The FAISS selector of present rows; None if all are present."""
        if not self.wasted:
            return None
        if self._skipped is None:
            there = np.ones(len(self.passages), bool)
            if isinstance(self.passages, MappedLines):
                there[self.passages.gone] = False
            else:
                there[[row for row, p in enumerate(self.passages) if p is None]] = False
            self._skipped = faiss.IDSelectorBitmap(np.packbits(there, bitorder="little"))
        return self._skipped


class FaissStore(KnowledgeStore):
    """A store with vectors in a FAISS index; passages are in memory or, memory-mapped, on disk."""

    kind = "faiss"

    def __init__(
        self,
        dimension: int,
        index: str = "flat",
        *,
        lists: int = 0,
        probes: int = 0,
        neighbours: int = 32,
        effort: int = 64,
        codes: int = 0,
    ):
        """Creates an empty store.

        Args:
          dimension: dimension of the vectors.
          index, lists, probes, neighbours, effort, codes: as in `FaissKind`. An index is trained as
            soon as it has enough vectors, and again by `refresh`.

        Raises:
          ConfigError: an unknown kind of index, or a number out of its range.
        """
        super().__init__()
        self._kind = FaissKind(index, lists, probes, neighbours, effort, codes)
        self._kind = dataclasses.replace(self._kind, codes=self._kind.coded(dimension))
        self.dimension, self.index = dimension, index
        self._held = Rows(self._kind.untrained(dimension), [])

    def __len__(self) -> int:
        return len(self._held)

    def passages(self) -> Iterable[Passage]:
        """All passages, in the order in which they were added."""
        return self._held.alive()

    # --- of this kind --------------------------------------------------------------------------

    def _built(self, passages: Sequence[Passage], vectors: np.ndarray, index=None) -> Rows:
        """Returns rows with an index trained on these vectors, unless an index is given."""
        index = self._kind.trained(vectors) if index is None else index
        held = Rows(index, [])
        held.append(passages, vectors)
        return held

    def _tidy(self) -> None:
        """Rebuilds the index if it has become trainable, or has too many deleted rows."""
        held = self._held
        untrained = isinstance(held.index, faiss.IndexFlat) and self._kind.lists_of(len(held))
        if untrained or held.wasted > WASTE * max(len(held.passages), 1000):
            index = None if untrained else _emptied(held.index)
            self._held = self._built([*held.alive()], held.vectors(), index)

    def _known(self, ids: Sequence[str]) -> set[str]:
        return {i for i in ids if i in self._held.row_of}

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return [self._held.passages[self._held.row_of[i]] for i in ids]

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        self._held.append(passages, vectors)
        self._tidy()

    def _delete(self, ids: Sequence[str]) -> None:
        self._held.drop(ids)
        self._tidy()

    @contextmanager
    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        built = self._built(passages, vectors)

        def commit():
            self._held = built

        yield commit

    def _search(self, questions, vectors: np.ndarray, k: int) -> list[list[Found]]:
        held, selector = self._held, self._held.selector()
        how = self._kind.parameters(held.index, k, selector)
        scores, rows = held.index.search(vectors, min(k, len(self)), params=how)
        return [
            [
                Found(held.passages[row], float(score))
                for row, score in zip(r, s, strict=True)
                if row >= 0
            ]
            for r, s in zip(rows.tolist(), scores, strict=True)
        ]

    # --- on disk -------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {"dimension": self.dimension} | dataclasses.asdict(self._kind)

    def _save(self, folder: pathlib.Path) -> None:
        try:
            faiss.write_index(self._held.index, str(folder / INDEX))
        except RuntimeError as error:  # such as on a full disk
            raise OSError(f"{folder / INDEX}: {error}") from error
        write_lines(folder / LINES, self._held.passages)

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        store = cls(**settings)
        flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
        index = faiss.read_index(str(folder / INDEX), flags | faiss.IO_FLAG_READ_ONLY)
        if not store._kind.made(index):
            raise CheckpointError(f"{folder / INDEX} is not an index of kind {store.index!r}")
        passages = MappedLines(folder / LINES) if memory_map else read_lines(folder / LINES)
        if (index.d, index.ntotal) != (store.dimension, len(passages)):
            raise CheckpointError(
                f"{folder} holds {index.ntotal} vectors of dimension {index.d} and {len(passages)} "
                f"passages for a store of dimension {store.dimension}; save it again"
            )
        store._held, store.read_only = Rows(index, passages), memory_map
        return store


def _emptied(index):
    """Returns a copy of a trained index without vectors."""
    fresh = faiss.clone_index(index)
    fresh.reset()
    if isinstance(fresh, faiss.IndexIVF):
        fresh.make_direct_map()
    return fresh
