"""FAISS indexes of four kinds, on the host: flat (exact), IVF, HNSW and PQ."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import faiss
import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.passage_lines import LINES, MappedLines, read_lines, write_lines

INDEXES = ("flat", "ivf", "hnsw", "pq")
# Vectors that k-means wants for a list, and for a codebook of 256.
PER_LIST, FEWEST_CODED = 39, 39 * 256
HNSW, TRAINED = faiss.IndexHNSWFlat, {"ivf": faiss.IndexIVFFlat, "pq": faiss.IndexIVFPQ}
INDEX = "index.faiss"
WASTE = 0.5  # of the rows may be of passages that are gone, before all are written anew


class Rows:
    """An index and the passage of each of its rows, which are only ever appended to.

    A passage that is deleted or replaced keeps its row, which searches skip: so every kind of index can
    delete.
    """

    def __init__(self, index, passages: Sequence[Passage | None] = ()):
        self.index, self.passages = index, passages
        self.row_of = {p.id: row for row, p in enumerate(passages) if p is not None}
        self._skipped = None

    @property
    def wasted(self) -> int:
        """Rows of passages that are gone."""
        return len(self.passages) - len(self.row_of)

    def alive(self) -> Iterator[Passage]:
        """The passages that are there."""
        return (self.passages[row] for row in self.row_of.values())

    def append(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Adds passages, and drops those with their ids."""
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
        """Those of `alive` [N, D], as the index has them."""
        whole = self.index.reconstruct_n(0, len(self.passages))
        return whole[[*self.row_of.values()]]

    def selector(self):
        """What tells FAISS to look at the rows that are there alone; None where all are."""
        if not self.wasted:
            return None
        if self._skipped is None:
            there = np.zeros(len(self.passages), bool)
            there[[*self.row_of.values()]] = True
            self._skipped = faiss.IDSelectorBitmap(np.packbits(there, bitorder="little"))
        return self._skipped


class FaissStore(KnowledgeStore):
    """Vectors in a FAISS index; passages in memory or, memory-mapped, on disk."""

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
        """An empty store.

        Args:
          index: "flat", exact; "ivf", vectors in lists, of which those nearest to a question are looked
            into; "hnsw", a graph of neighbours; "pq", IVF whose vectors are codes. They are trained
            on the first vectors that are enough, and anew by `refresh`.
          lists: of ivf and pq; 0 for the root of the vectors that they are trained on. Until there are
            39 for each (10,000 for pq) the search is exact.
          probes: lists that are looked into; 0 for a quarter of them.
          neighbours: of each vector in hnsw.
          effort: candidates that hnsw keeps as it searches; more find more, and take longer.
          codes: bytes of a vector in pq; 0 for one for every 4 dimensions.

        Raises:
          ConfigError: an unknown kind of index, a number out of its range.
        """
        super().__init__()
        if index not in INDEXES:
            raise ConfigError(f"index must be one of {INDEXES}, got {index!r}")
        if min(lists, probes, codes) < 0 or neighbours < 2 or effort < 1 or dimension < 1:
            raise ConfigError(
                "a store needs dimension >= 1, lists, probes and codes >= 0, neighbours >= 2 and "
                f"effort >= 1, got {dimension}, {lists}, {probes}, {codes}, {neighbours} and {effort}"
            )
        codes = codes or next(n for n in range(max(dimension // 4, 1), 0, -1) if dimension % n == 0)
        if dimension % codes:
            raise ConfigError(f"codes must divide the dimension {dimension}, got {codes}")
        self.dimension, self.index = dimension, index
        self.lists, self.probes, self.codes = lists, probes, codes
        self.neighbours, self.effort = neighbours, effort
        self._held = Rows(self._untrained(), [])

    def __len__(self) -> int:
        return len(self._held.row_of)

    def passages(self) -> Iterable[Passage]:
        """All passages, in the order they came in."""
        return self._held.alive()

    # --- of this kind --------------------------------------------------------------------------

    def _untrained(self):
        if self.index == "hnsw":
            metric = faiss.METRIC_INNER_PRODUCT
            return faiss.IndexHNSWFlat(self.dimension, self.neighbours, metric)
        return faiss.IndexFlatIP(self.dimension)

    def _lists(self, size: int) -> int:
        """Lists for so many vectors; 0 where they are too few to train on."""
        lists = self.lists or int(size**0.5)
        fewest = max(PER_LIST * lists, FEWEST_CODED * (self.index == "pq"))
        return lists if self.index in ("ivf", "pq") and size >= fewest else 0

    def _built(self, passages: Sequence[Passage], vectors: np.ndarray, index=None) -> Rows:
        """Rows of an index that is trained on them, unless there is one."""
        lists = self._lists(len(vectors)) if index is None else 0
        index = self._untrained() if index is None else index
        if lists:
            coarse, metric = faiss.IndexFlatIP(self.dimension), faiss.METRIC_INNER_PRODUCT
            if self.index == "ivf":
                index = faiss.IndexIVFFlat(coarse, self.dimension, lists, metric)
            else:
                index = faiss.IndexIVFPQ(coarse, self.dimension, lists, self.codes, 8, metric)
            index.train(vectors)
            index.make_direct_map()  # so that vectors can be read back
        held = Rows(index, [])
        held.append(passages, vectors)
        return held

    def _tidy(self) -> None:
        """Builds the index anew where it can be trained at last, or holds too much that is gone."""
        held = self._held
        untrained = isinstance(held.index, faiss.IndexFlat) and self._lists(len(held.row_of))
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
        if self.index == "hnsw":
            how = faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.effort, k))
        elif isinstance(held.index, faiss.IndexFlat):
            how = faiss.SearchParameters(sel=selector)
        else:
            probes = self.probes or -(-held.index.nlist // 4)
            kind = faiss.SearchParametersIVF
            kind = faiss.IVFPQSearchParameters if self.index == "pq" else kind
            how = kind(sel=selector, nprobe=min(probes, held.index.nlist))
        scores, rows = held.index.search(vectors, min(k, len(self)), params=how)
        return [
            [
                Found(held.passages[row], float(score))
                for row, score in zip(r, s, strict=True)
                if row >= 0
            ]
            for r, s in zip(rows.tolist(), scores, strict=True)
        ]

    def _fits(self, index) -> bool:
        """Whether a file held what `_built` builds: vectors in the file itself, and inner products."""

        def flat(other) -> bool:
            return type(other) in (faiss.IndexFlat, faiss.IndexFlatIP)

        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            return False
        if self.index == "hnsw":
            storage = faiss.downcast_index(index.storage) if type(index) is HNSW else None
            return flat(storage) and storage.metric_type == faiss.METRIC_INNER_PRODUCT
        if type(index) is not TRAINED.get(self.index):
            return flat(index)
        lists = faiss.downcast_InvertedLists(index.invlists)
        return flat(faiss.downcast_index(index.quantizer)) and type(lists) in (
            faiss.ArrayInvertedLists,
        )

    # --- on disk -------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        names = ("dimension", "index", "lists", "probes", "neighbours", "effort", "codes")
        return {name: getattr(self, name) for name in names}

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
        if not store._fits(index):
            raise CheckpointError(f"{folder / INDEX} is no index of kind {store.index!r}")
        passages = MappedLines(folder / LINES) if memory_map else read_lines(folder / LINES)
        if (index.d, index.ntotal) != (store.dimension, len(passages)):
            raise CheckpointError(
                f"{folder} holds {index.ntotal} vectors of dimension {index.d} and {len(passages)} "
                f"passages for a store of dimension {store.dimension}; save it again"
            )
        store._held, store.read_only = Rows(index, passages), memory_map
        return store


def _emptied(index):
    """An index trained as this one, without vectors."""
    fresh = faiss.clone_index(index)
    fresh.reset()
    if isinstance(fresh, faiss.IndexIVF):
        fresh.make_direct_map()
    return fresh
