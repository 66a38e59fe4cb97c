"""Exact search on the device: a GPU, a TPU, or a CPU through XLA."""

import pathlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.index.device_index import BLOCK, TILE, put_rows, search_blocks
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.passage_lines import read_pairs, write_pairs
from fedrag_jax.retrieval.stores.passage_source import found_in


class DeviceStore(KnowledgeStore):
    """A store with vectors in blocks on JAX's default device and passages in memory.

    Rows are dense: the last row fills the place of a deleted one. The capacity doubles when it is full,
    so programs are compiled for few sizes.
    """

    kind = "device"

    def __init__(self, dimension: int):
        """Creates an empty store.

        Raises:
          ConfigError: a dimension below 1.
        """
        super().__init__()
        if dimension < 1:
            raise ConfigError(f"a store needs dimension >= 1, got {dimension}")
        self.dimension = dimension
        self._blocks = jnp.zeros((1, TILE, dimension), jnp.float32)
        self._rows: list[Passage] = []
        self._row_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def passages(self) -> Iterable[Passage]:
        """All passages."""
        return iter([*self._rows])

    def _known(self, ids: Sequence[str]) -> set[str]:
        return {i for i in ids if i in self._row_of}

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return [self._rows[self._row_of[i]] for i in ids]

    def _put(self, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        new: dict[str, int] = {}
        for passage in passages:
            if passage.id not in self._row_of:
                new[passage.id] = len(self._rows) + len(new)
        places = [self._row_of.get(p.id, new.get(p.id, -1)) for p in passages]
        # The device may have no room, so this comes before anything else changes.
        self._blocks = _put(_grown(self._blocks, len(self) + len(new)), places, vectors)
        self._row_of |= new
        self._rows += [p for p in passages if p.id in new]
        for row, passage in zip(places, passages, strict=True):
            self._rows[row] = passage

    def _delete(self, ids: Sequence[str]) -> None:
        sources: dict[int, int] = {}  # row -> whose vector it gets
        for identifier in ids:
            row, last = self._row_of.pop(identifier), len(self._rows) - 1
            moved = self._rows.pop()
            if row != last:
                self._rows[row], self._row_of[moved.id] = moved, row
                sources[row] = sources.pop(last, last)
        sources = {row: source for row, source in sources.items() if row < len(self._rows)}
        if sources:
            flat = self._blocks.reshape(-1, self.dimension)
            vectors = np.asarray(flat[np.array([*sources.values()])])
            self._blocks = _put(self._blocks, [*sources], vectors)

    @contextmanager
    def _fresh(self, passages: Sequence[Passage], vectors: np.ndarray):
        rows = [self._row_of[p.id] for p in passages]
        blocks = _put(jnp.zeros_like(self._blocks), rows, vectors)
        blocks.block_until_ready()

        def commit():
            self._blocks = blocks

        yield commit

    def _search(self, questions, vectors: np.ndarray, k: int) -> list[list[Found]]:
        rows, scores = search_blocks(self._blocks, len(self), vectors, min(k, len(self)))
        return found_in(self._rows, rows.tolist(), scores)

    # --- on disk -------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {"dimension": self.dimension}

    def _save(self, folder: pathlib.Path) -> None:
        vectors = np.asarray(self._blocks).reshape(-1, self.dimension)[: len(self)]
        write_pairs(folder, self._rows, vectors)

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        store = cls(**settings)
        store.add(*read_pairs(folder, store.dimension))
        return store


def _grown(blocks: jax.Array, size: int) -> jax.Array:
    """Returns blocks with room for `size` rows: one block until it is full, then more blocks."""
    count, block, dimension = blocks.shape
    room = count * block
    while room < size:
        room *= 2
    if room == count * block:
        return blocks
    flat = jnp.pad(blocks.reshape(-1, dimension), ((0, room - count * block), (0, 0)))
    return flat.reshape(-1, min(room, BLOCK), dimension)


def _put(blocks: jax.Array, rows: Sequence[int], vectors: np.ndarray) -> jax.Array:
    """As `put_rows`, padded to a power of two by repeating the last row; compiled for few counts."""
    places = np.minimum(np.arange(1 << (len(rows) - 1).bit_length()), len(rows) - 1)
    return put_rows(blocks, np.asarray(rows)[places], vectors[places])
