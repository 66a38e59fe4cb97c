"""Vectors of a corpus in one file, written shard by shard and memory-mapped."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np

from fedrag_jax import files

VECTORS, DONE = "vectors.npy", "done"


class VectorFile:
    """A file `vectors.npy` [N, D] in a folder, with a record of the finished shards of its rows.

    Several processes, also on several hosts that share the folder, may write shards of one file. A
    shard is finished when `done/NUMBER.json` has its sha256 and its seconds; a shard that does not
    match is written again.

    Args:
      rows: N, the number of rows.
      shard: rows per shard; the last shard may have fewer.
    """

    def __init__(self, folder: Path, rows: int, shard: int):
        self.folder, self.rows, self.shard = folder, rows, shard
        self.count = -(-rows // shard)

    def rows_of(self, number: int) -> slice:
        """The rows of a shard."""
        return slice(number * self.shard, min((number + 1) * self.shard, self.rows))

    def missing(self) -> list[int]:
        """Returns the shards to write, in order; damaged ones are reported."""
        vectors = self._mapped("r")
        if vectors is None:
            return [*range(self.count)]
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            checked = pool.map(lambda number: self._checked(number, vectors), range(self.count))
            return [number for number, fine in enumerate(checked) if not fine]

    def write(self, number: int, vectors: np.ndarray, seconds: float) -> None:
        """Writes the vectors [R, D] of a shard; the first one creates the file.

        Raises:
          OSError, ConfigError: the vectors, or the note on them, cannot be written.
        """
        mapped = self._mapped("r+")
        if mapped is None:
            self._make(vectors.shape[1], vectors.dtype)
            mapped = self._mapped("r+")
        mapped[self.rows_of(number)] = vectors
        mapped.flush()
        about = {"sha256": _sha256(vectors), "seconds": seconds}
        files.write_json(self._marker(number), about)

    def read(self) -> np.ndarray:
        """Returns all vectors, memory-mapped and read-only."""
        return np.asarray(self._mapped("r"))

    def seconds(self) -> float:
        """The total seconds of all shards."""
        return sum(about["seconds"] for about in map(self._about, range(self.count)) if about)

    def _marker(self, number: int) -> Path:
        return self.folder / DONE / f"{number}.json"

    def _about(self, number: int) -> dict | None:
        return files.kept(files.read_json, self._marker(number))

    def _checked(self, number: int, vectors: np.ndarray) -> bool:
        about = self._about(number)
        if about is None:
            return False
        if about["sha256"] == _sha256(vectors[self.rows_of(number)]):
            return True
        warnings.warn(
            f"{self.folder / VECTORS} is damaged (checksum of shard {number}): embedding again",
            stacklevel=5,
        )
        return False

    def _mapped(self, mode: str) -> np.ndarray | None:
        """Returns the memory-mapped file; None if there is none with this number of rows."""
        path = self.folder / VECTORS
        try:
            found = np.load(path, mmap_mode=mode, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}): embedding again", stacklevel=4)
            return None
        return found if found.ndim == 2 and len(found) == self.rows else None

    def _make(self, dimension: int, dtype: np.dtype) -> None:
        """Creates an empty file, unless another process already did."""
        (self.folder / DONE).mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / files.LOCK):
            if self._mapped("r") is not None:
                return
            for marker in self._markers():
                marker.unlink()
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                temporary = Path(file.name)
            try:
                shape = self.rows, dimension
                np.lib.format.open_memmap(temporary, "w+", dtype, shape).flush()
                os.replace(temporary, self.folder / VECTORS)
            finally:
                temporary.unlink(missing_ok=True)

    def _markers(self) -> Iterator[Path]:
        return (self.folder / DONE).glob("*.json")


def _sha256(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors)).hexdigest()
