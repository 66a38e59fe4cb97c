"""Passages as lines of a file, in memory or read from disk on demand, and their vectors."""

import dataclasses
import json
import mmap
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError

LINES = "passages.jsonl"  # in the folder of a store
VECTORS = "vectors.npy"
FIELDS = {field.name for field in dataclasses.fields(Passage)}


def write_lines(path: pathlib.Path, passages: Iterable[Passage | None]) -> None:
    """Writes one JSON object per line, null for a row whose passage was deleted."""
    with open(path, "w", encoding="utf-8") as file:
        for passage in passages:
            row = None if passage is None else dataclasses.asdict(passage)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(path: pathlib.Path) -> list[Passage | None]:
    """Reads a file that `write_lines` wrote.

    Raises:
      CheckpointError: a line that is not a passage.
    """
    with open(path, "rb") as file:
        return [_passage(line, f"{path}:{i}") for i, line in enumerate(file, start=1)]


def write_pairs(folder: pathlib.Path, passages: Sequence[Passage], vectors: np.ndarray) -> None:
    """Writes passages and their vectors [N, D]."""
    np.save(folder / VECTORS, vectors, allow_pickle=False)
    write_lines(folder / LINES, passages)


def read_pairs(folder: pathlib.Path, dimension: int) -> tuple[list[Passage], np.ndarray]:
    """Reads files that `write_pairs` wrote.

    Raises:
      CheckpointError: files that do not belong together.
    """
    passages = read_lines(folder / LINES)
    # Mapped: a shape that a damaged header tells is not taken for memory.
    vectors = np.load(folder / VECTORS, allow_pickle=False, mmap_mode="r")
    shape = getattr(vectors, "shape", None)
    if None in passages or shape != (len(passages), dimension):
        raise CheckpointError(
            f"{folder} holds vectors {shape} for {len(passages)} passages and dimension {dimension}; "
            "save it again"
        )
    return passages, np.array(vectors, np.float32)


class MappedLines(Sequence):
    """Memory-mapped passages; only requested ones are read.

    Attributes:
      gone: int [G], the rows of deleted passages.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        with open(path, "rb") as file:
            # An empty file cannot be mapped.
            self._bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        ends = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == ord("\n"))
        self._starts = np.concatenate([[0], ends + 1])
        # No passage is as short as "null" and its end.
        self.gone = np.flatnonzero(np.diff(self._starts) == len("null\n"))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Passage | None:
        if not 0 <= row < len(self):
            raise IndexError(row)
        line = self._bytes[self._starts[row] : self._starts[row + 1]]
        return _passage(line, f"{self._path}:{row + 1}")


def _passage(line: bytes, where: str) -> Passage | None:
    try:
        row = json.loads(line)
        if row is None:
            return None
        if not (row.keys() == FIELDS and all(isinstance(value, str) for value in row.values())):
            raise ValueError(f"a passage has the fields {sorted(FIELDS)}, all of them text")
        return Passage(**row)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: no passage of a store ({error}); save it again") from error
