"""The results of a run in a file, one line per question, which survives a kill.

The first line describes the questions, the settings and the system. Lines are added a batch at a time;
an incomplete last line is removed.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedrag_jax import files
from fedrag_jax.errors import ConfigError, DataError

Row = dict[str, Any]


class Record:
    """The rows by question, including those already in the file.

    Raises:
      ConfigError: the file holds rows of another system, other questions or other settings, or another
        process writes to its folder.
      DataError: a damaged line.
    """

    def __init__(self, path: pathlib.Path, asked: Mapping[str, Any]):
        self.path, self.rows = path, {}
        self._held = files.hold(path.parent)
        asked = json.loads(_line(asked))  # as the file gives it back
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = kept.decode("utf-8").split("\n")[:-1]
        parsed = [self._parsed(line, number) for number, line in enumerate(lines, start=1)]
        if not parsed:
            files.write_text(path, _line(asked))
            return
        self._require_same(parsed[0], asked)
        if len(kept) < len(whole):
            os.truncate(path, len(kept))
        self.rows = {row["id"]: row for row in parsed[1:]}

    def add(self, rows: Sequence[Row]) -> None:
        """Appends rows and flushes them to disk."""
        with files.writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
        self.rows |= {row["id"]: row for row in rows}

    def _parsed(self, line: str, number: int) -> Row:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or (number > 1 and "id" not in row):
                raise ValueError("not a row")
            return row
        except ValueError as error:
            raise DataError(
                f"{self.path}:{number} is damaged ({error}); delete that line to ask its question "
                "again, or the file to ask all"
            ) from error

    def _require_same(self, before: Row, asked: Row) -> None:
        was, now = _flat(before), _flat(asked)
        names = [n for n in sorted({*was, *now}) if was.get(n) != now.get(n)]
        if names:
            changed = "; ".join(f"{n}: {was.get(n)!r} then, {now.get(n)!r} now" for n in names)
            raise ConfigError(
                f"{self.path} holds another run ({changed}): give this one another folder, or "
                "delete the file"
            )


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        inside = isinstance(value, dict)
        flat |= _flat(value, f"{above}{name}.") if inside else {above + name: value}
    return flat


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
