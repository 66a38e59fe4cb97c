"""The journal of indexing on disk, from which a killed run resumes."""

import json
import pathlib
import sqlite3
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError

SCHEMA = """
    CREATE TABLE IF NOT EXISTS origin (root TEXT NOT NULL, tokens INTEGER, overlap INTEGER);
    CREATE TABLE IF NOT EXISTS files (
        name TEXT PRIMARY KEY, digest TEXT NOT NULL, passages TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS unread (name TEXT PRIMARY KEY, what TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, vector BLOB NOT NULL);
"""


class Origin(NamedTuple):
    """The source of the passages.

    Attributes:
      root: the folder of the documents.
      tokens, overlap: as in `indexing.index`.
    """

    root: str
    tokens: int
    overlap: int


class Journal:
    """Stores the passages of every file that was read and, until a store has them, their vectors.

    Changes survive a kill once their call has returned; others are discarded. Only one process can
    hold a journal.
    """

    def __init__(self, path: pathlib.Path):
        """Opens a journal, or creates one.

        Raises:
          ConfigError: another process holds it.
          CheckpointError: the file is not a journal.
        """
        self.path = path
        with self._asking():
            self._database = sqlite3.connect(path, timeout=1, isolation_level=None)
            # The first thing written takes the lock, which then stays.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN EXCLUSIVE")
            for statement in filter(str.strip, SCHEMA.split(";")):
                self._database.execute(statement)
            self._database.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._database.close()

    @property
    def origin(self) -> Origin | None:
        """The source of the passages; None in a new journal."""
        with self._asking():
            row = self._database.execute("SELECT root, tokens, overlap FROM origin").fetchone()
        return Origin(*row) if row else None

    @origin.setter
    def origin(self, origin: Origin) -> None:
        with self._asking(), self._whole():
            self._database.execute("DELETE FROM origin")
            self._database.execute("INSERT INTO origin VALUES (?, ?, ?)", origin)

    def passages(self, name: str, digest: str = "") -> list[Passage] | None:
        """Returns the passages of a file; None if the file is unknown or has another digest."""
        with self._asking():
            row = self._database.execute(
                "SELECT digest, passages FROM files WHERE name = ?", (name,)
            ).fetchone()
            if row is None or digest not in ("", row[0]):
                return None
            return [Passage(*fields) for fields in json.loads(row[1])]

    def unread(self, name: str) -> str:
        """Returns the unreadable part of a file; "" if all was read."""
        with self._asking():
            row = self._database.execute(
                "SELECT what FROM unread WHERE name = ?", (name,)
            ).fetchone()
        return row[0] if row else ""

    def keep_passages(
        self, name: str, digest: str, passages: Sequence[Passage], unread: str = ""
    ) -> None:
        """Stores the passages of a file, and its unreadable part."""
        told = json.dumps([[p.id, p.title, p.text, p.topic] for p in passages])
        with self._asking(), self._whole():
            self._database.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (name, digest, told)
            )
            self._database.execute("DELETE FROM unread WHERE name = ?", (name,))
            if unread:
                self._database.execute("INSERT INTO unread VALUES (?, ?)", (name, unread))

    def names(self) -> set[str]:
        """Returns the names of the known files."""
        with self._asking():
            return {name for (name,) in self._database.execute("SELECT name FROM files")}

    def vector(self, key: str) -> np.ndarray | None:
        """Returns a stored vector, float32 [D], or None."""
        with self._asking():
            row = self._database.execute(
                "SELECT vector FROM vectors WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else np.frombuffer(row[0], np.float32)

    def keep_vectors(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Stores vectors [N, D]."""
        rows = [(k, v.tobytes()) for k, v in zip(keys, vectors.astype(np.float32), strict=True)]
        with self._asking(), self._whole():
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def finish(self, gone: Sequence[str]) -> None:
        """Deletes vectors, which are now in a store, and files that no longer exist."""
        with self._asking():
            with self._whole():
                self._database.execute("DELETE FROM vectors")
                for table in ("files", "unread"):
                    names = [(name,) for name in gone]
                    self._database.executemany(f"DELETE FROM {table} WHERE name = ?", names)
            self._database.execute("VACUUM")

    @contextmanager
    def _whole(self):
        self._database.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _asking(self):
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(
                    f"{self.path} is held by another process that indexes: wait for it to end"
                ) from error
            raise ConfigError(f"{self.path} cannot be written ({error})") from error
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({error}): delete it, and all files are read again"
            ) from error
