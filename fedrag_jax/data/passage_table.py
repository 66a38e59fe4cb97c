"""Passages in a memory-mapped Arrow table; a passage becomes a Python object when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from fedrag_jax.data.documents import split
from fedrag_jax.data.examples import Passage, text_of
from fedrag_jax.data.file_kinds import Document
from fedrag_jax.data.spelling import definition
from fedrag_jax.errors import DataError

if TYPE_CHECKING:
    import datasets

FIELDS = ("id", "title", "text", "topic")
_AT_ONCE = 1000  # rows


class PassageTable(Sequence[Passage]):
    """The rows of a table as a sequence of passages.

    Args:
      rows: rows opened by `datasets`.
      columns: the column of each of `FIELDS`; `text` is required, ids are row numbers by default.
      where: name of the table, for messages.

    Raises:
      DataError: a missing column, an empty text without a title column, an empty or repeated id, or no
        rows.
    """

    def __init__(self, rows: datasets.Dataset, columns: Mapping[str, str], where: str):
        wanted = {field: column for field, column in columns.items() if column}
        if missing := [c for c in wanted.values() if c not in rows.column_names]:
            raise DataError(
                f"{where} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}"
            )
        if "text" not in wanted or not {*wanted} <= {*FIELDS}:
            raise DataError(f"{where}: columns need 'text' and may have {FIELDS}, got {wanted}")
        if not len(rows):
            raise DataError(f"{where}: the corpus is empty; give at least one passage")
        self.rows, self.where, self._columns = (
            rows.select_columns([*wanted.values()]),
            where,
            wanted,
        )
        if "title" not in wanted:  # some corpora have passages of which only the title is known
            self._require_filled("text", wanted["text"])
        if "id" in wanted:
            self._require_filled("id", wanted["id"])
            self._require_unique(wanted["id"])

    def _require_filled(self, field: str, column: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self.rows.data.column(column)
        empty = pc.is_null(values)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            # Their lengths alone: the texts of a large corpus stay on disk.
            empty = pc.or_(empty, pc.equal(pc.fill_null(pc.binary_length(values), 0), 0))
        row = pc.index(empty, True).as_py()
        if row >= 0:
            raise DataError(
                f"{self.where}, row {row}: the {field} in column {column!r} is empty: fill it in, or "
                "leave the row out"
            )

    def _require_unique(self, column: str) -> None:
        import pyarrow.compute as pc

        counts = pc.value_counts(self.rows.data.column(column))
        if len(counts) < len(self):
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            raise DataError(
                f"{self.where}: passage id {str(twice)!r} occurs twice; ids must be unique"
            )

    @property
    def fingerprint(self) -> str:
        """Equal for tables of equal passages created in the same way."""
        return f"{self.rows._fingerprint} {sorted(self._columns.items())}"

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Passage: ...

    @overload
    def __getitem__(self, row: slice) -> list[Passage]: ...

    def __getitem__(self, row):
        if not isinstance(row, slice):
            row = range(len(self))[row]  # from the end, or none, as of a list
            return self._passage(self.rows[row], row)
        numbers = range(len(self))[row]
        return [*self._passages(self.rows[numbers], numbers)]

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def column(self, field: str) -> Iterator[str]:
        """Yields one of `FIELDS` for each passage."""
        if field not in self._columns:
            yield from map(str, range(len(self))) if field == "id" else [""] * len(self)
            return
        for chunk in self.rows.data.column(self._columns[field]).chunks:
            for value in chunk:
                yield text_of(value.as_py())

    def cut(self, tokenizer, tokens: int) -> PassageTable:
        """Splits the texts into passages of at most `tokens` tokens (`documents.split`), kept on disk.

        Args:
          tokenizer: a Hugging Face tokenizer.

        Raises:
          ConfigError: fewer than one token.
        """
        how = f"{self.fingerprint} {definition(tokenizer)} {tokens}"
        name = hashlib.sha256(how.encode()).hexdigest()[:16]

        def cut(batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[str]]:
            found: dict[str, list[str]] = {field: [] for field in FIELDS}
            for whole in self._passages(batch, numbers):
                for piece in pieces(whole, tokenizer, tokens):
                    for field in FIELDS:
                        found[field].append(getattr(piece, field))
            return found

        rows = self.rows.map(
            cut,
            batched=True,
            with_indices=True,
            remove_columns=self.rows.column_names,
            new_fingerprint=name,
            desc="cut passages",
        )
        return PassageTable(rows, {field: field for field in FIELDS}, self.where)

    def _passage(self, row: Mapping[str, Any], number: int) -> Passage:
        fields = {field: text_of(row[column]) for field, column in self._columns.items()}
        return Passage(**{"id": str(number), "title": ""} | fields)

    def _passages(self, batch: Mapping[str, list], numbers: Iterable[int]) -> Iterator[Passage]:
        for place, number in enumerate(numbers):
            yield self._passage({name: column[place] for name, column in batch.items()}, number)


def pieces(passage: Passage, tokenizer, tokens: int) -> list[Passage]:
    """Splits a passage into passages of at most `tokens` tokens, ID#0 and so on; or returns it if
    short.

    Raises:
      ConfigError: fewer than one token.
    """
    document = Document(passage.id, passage.title, passage.text, named=True)
    cut = split(document, tokenizer, tokens, tokens // 5)
    return [Passage(p.id, p.title, p.text, passage.topic) for p in cut]
