"""The minimal interface of a store: search passages, save and load a folder."""

import abc
import json
import pathlib
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from fedrag_jax import files
from fedrag_jax.data.examples import Passage, half_character
from fedrag_jax.errors import CheckpointError, ConfigError, DataError

FORMAT = 1
SETTINGS = "store.json"
DATA = re.compile(r"store-data-([1-9]\d{0,8})")  # a folder of ours in the folder of a store


class Found(NamedTuple):
    """A passage and its score; higher is better. The kind of score depends on the store."""

    passage: Passage
    score: float


def found_in(passages: Sequence[Passage], rows, scores) -> list[list[Found]]:
    """Returns what a search found, from rows of passages and scores, both [Q, k]."""
    return [
        [Found(passages[row], float(score)) for row, score in zip(r, s, strict=True)]
        for r, s in zip(rows, scores, strict=True)
    ]


class PassageSource(abc.ABC):
    """A source of passages, searched by vectors, by words or by an external service.

    Attributes:
      kind: name of the kind in a saved folder.
      dimension: dimension of its vectors; None if it is searched only by words.
      cosines: whether scores are inner products of vectors.
    """

    kind: ClassVar[str]
    dimension: int | None = None
    cosines: bool = True

    def __init__(self):
        # Held by whoever changes or saves it, however long that takes.
        self._changing = threading.RLock()

    @abc.abstractmethod
    def search(
        self, questions: Sequence[str], vectors: np.ndarray | None = None, k: int = 5
    ) -> list[list[Found]]:
        """Returns the k best passages for each question, best first; all passages if there are fewer.

        Args:
          vectors: [Q, D] question vectors, for sources with a dimension.

        Raises:
          ConfigError: k below 1.
        """

    def description(self) -> dict[str, Any]:
        """Settings that distinguish it from other sources of the same passages, as JSON."""
        return {"kind": self.kind} | self._settings()

    # --- on disk ------------------------------------------------------------------------------

    def save(self, path: str | pathlib.Path) -> None:
        """Saves the store to a folder, replacing an old one atomically.

        The old content stays until the new one is complete. Only one process at a time may save to a
        folder.

        Raises:
          CheckpointError: a foreign file has the name of the settings file.
          ConfigError: a file cannot be written.
        """
        folder = pathlib.Path(path)
        if (folder / SETTINGS).exists() and not is_store(folder):
            raise CheckpointError(
                f"{folder / SETTINGS} is not of a saved store and would be lost: choose another "
                "folder, or delete it"
            )
        with self._changing, files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            ours = {p: DATA.fullmatch(p.name) for p in folder.iterdir() if p.is_dir()}
            former = [p for p, match in ours.items() if match]
            number = 1 + max((int(match[1]) for match in ours.values() if match), default=0)
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
            files.write_json(folder / SETTINGS, settings, indent=2)
            for gone in former:
                shutil.rmtree(gone, ignore_errors=True)

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """Whether a saved folder only names another place of the passages: a server or another
        folder."""
        return False

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """A description of that place for messages."""
        return str(settings)

    # --- of each kind --------------------------------------------------------------------------

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The settings that `_load` needs, as JSON."""

    @abc.abstractmethod
    def _save(self, folder: pathlib.Path) -> None: ...

    @classmethod
    @abc.abstractmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        """Loads a store from a folder that `_save` wrote."""


def is_store(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a saved store; checks the content of its settings file."""
    try:
        told = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and bool(DATA.fullmatch(str(told.get("data"))))


def strings(values: Iterable[str], what: str) -> list[str]:
    """Returns a list of strings; refuses a single string, which would be split into letters.

    Raises:
      ConfigError: a single string.
      DataError: a string that contains half a character.
    """
    if isinstance(values, str):
        raise ConfigError(f"{what} must be a list of strings, got the string {values!r}")
    values = [*values]
    for value in values:
        if isinstance(value, str) and (fault := half_character(value)):
            raise DataError(f"{value[:80]!r} among {what} {fault}")
    return values
