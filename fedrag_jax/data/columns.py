"""Reads any table as a data set, given the columns of questions, answers and passages."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fedrag_jax.data import hub_tables, splits
from fedrag_jax.data.examples import Passage, text_of
from fedrag_jax.data.hub_rows import Question, Read, Row, passage_of
from fedrag_jax.data.named_sets import Asked, asked
from fedrag_jax.errors import ConfigError, DataError

T = TypeVar("T")

# Which split of a table is which here.
SIDES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
         "dev": "validation", "test": "test"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns; "" for none. A dot selects a field of a nested column, also within lists:
    "context.title". A list in a CSV file is written as JSON.

    Attributes:
      question: the question, a text.
      answers: a text, a number, a boolean (yes or no), or a list of these.
      passages: the passages of the question, one text or a list; a list of sentences is one passage.
      titles: the titles of the passages, one each.
      gold: the gold passages: positions from 0, one boolean (or 0 or 1) per passage, or titles; an
        empty list for none. Without the column, the passage of a row that has only one is gold. If
        there are no passages, titles of pages in another corpus.
      topic: the label by which clients differ.
      split: the name of the row's split, for tables with all splits in one.
      id: the id; by default the split's name and the row number.
    """

    question: str = ""
    answers: str = ""
    passages: str = ""
    titles: str = ""
    gold: str = ""
    topic: str = ""
    split: str = ""
    id: str = ""

    def __post_init__(self):
        for name in ("question", "answers"):
            if not getattr(self, name):
                raise ConfigError(f"columns.{name} is empty: name the column that has it")

    def read(self, source: str, config: str = "", revision: str = "") -> Asked:
        """Reads all splits of a table.

        With `split`, that column decides alone. Without it, if there are several splits and none is
        a test split, the validation split becomes the test split; a single split is divided by id into
        70, 10 and 20 percent. If there is then no validation split, it is a tenth of train.

        Args:
          source, config, revision: as for `hub_tables.table`; the origin records the commit.

        Raises:
          DataError: the table cannot be read; a column is missing or has the wrong content (the error
            lists the columns); an id or a passage is empty; a split is not one of `SIDES`.
        """
        at = hub_tables.commit(source, revision)
        names = hub_tables.splits(source, config or None, at)
        origin = hub_tables.origin(source, config, at)
        return asked(self._rows(source, config or None, at, names), origin)

    def _rows(self, source, config, revision, names: list[str]) -> Iterator[tuple[Read, str]]:
        sides = {name: splits.labelled(name, SIDES, source) for name in names}
        if len(names) > 1 and "test" not in sides.values():
            sides = {n: "test" if s == "validation" else s for n, s in sides.items()}

        def converted(name, convert: Callable[[Row, str], T]) -> Iterator[T]:
            rows = hub_tables.table(source, config, name, revision, texts=True)
            if hub_tables.is_csv(rows):
                rows = map(self._told_by_texts, rows)
            return hub_tables.converted(rows, convert, source, name, "config.data.columns")

        kinds = itertools.chain.from_iterable(converted(n, self._numbers_are_truths) for n in names)
        truths = bool(self.gold) and next((kind for kind in kinds if kind is not None), False)
        for name in names:
            read = converted(name, functools.partial(self._read, truths=truths))
            for number, ((question, passages), label) in enumerate(read):
                where = f"{source}, split {name!r}, row {number}"
                if self.split:
                    side = splits.labelled(label, SIDES, where)
                else:
                    side = sides[name] if len(names) > 1 else splits.side(question.id)
                yield (question, passages), side

    def _told_by_texts(self, row: Row) -> Row:
        """Returns a row of a CSV file, which has texts alone, with the values that the texts mean."""
        found = {column: None if value == "" else value for column, value in row.items()}
        for name in ("answers", "passages", "titles", "gold"):
            text = found.get(column := getattr(self, name))
            if not isinstance(text, str):
                continue
            if text.startswith("[") and isinstance(some := _json(text), list):
                found[column] = some
            elif name in ("answers", "gold") and text.lower() in ("true", "false"):
                found[column] = text.lower() == "true"
            elif name == "gold" and self.passages and text.isdecimal():
                titled = text in _several(found.get(self.titles))
                found[column] = text if titled else int(text)
        return found

    def _numbers_are_truths(self, row: Row, place: str) -> bool | None:
        """Returns whether 0 and 1 in `gold` are truths of passages, not positions; None if this row may
        be either, such as [0, 1] of two passages."""
        told, passages = (_several(self._value(row, name)) for name in ("gold", "passages"))
        if not told:
            return None
        if not _whole(told) or len(told) != len(passages) or not {*told} <= {0, 1}:
            return False
        return True if len({*told}) < len(told) or told == [1] else None

    def _read(self, row: Row, place: str, truths: bool) -> tuple[Read, str]:
        titles = [text_of(title) for title in _several(self._value(row, "titles"))]
        texts = [_text(text) for text in _several(self._value(row, "passages"))]
        for number, text in enumerate(texts):
            if not text.strip() and not any(titles[number : number + 1]):
                raise DataError(
                    f"{place}: passage {number} of {len(texts)}, from 0, in column {self.passages!r} "
                    "is empty: fill it in, or leave it out"
                )
        if titles and texts and len(titles) != len(texts):
            raise DataError(f"{place}: {len(titles)} titles of {len(texts)} passages")
        both = zip(titles or [""] * len(texts), texts, strict=False)
        passages = [passage_of(title, text) for title, text in both]
        golds, pages = self._golds(row, place, passages, truths)
        asked = self._value(row, "question")
        if not isinstance(asked, str) or not asked.strip():
            raise DataError(f"{place}: column {self.question!r} must be a question, got {asked!r}")
        name = text_of(self._value(row, "id")) if self.id else place
        if not name.strip():
            raise DataError(
                f"{place}: the id in column {self.id!r} is empty: give every question one, or none and "
                'columns.id=""'
            )
        question = Question(
            name,
            asked,
            tuple(map(_answer, _given(self._value(row, "answers")))),
            golds=golds,
            titles=pages,
            topic=text_of(self._value(row, "topic")),
            hops=max(len(golds), 1),
        )
        return (question, passages), text_of(self._value(row, "split"))

    def _golds(self, row: Row, place: str, passages: Sequence[Passage], truths: bool):
        """Ids of passages and titles of pages that hold the answer."""
        told = _several(self._value(row, "gold"))
        if not passages:
            return (), tuple(map(str, _given(told)))
        if not self.gold:
            gold = passages if len(passages) == 1 else []
        elif told and ((truths and _whole(told)) or all(isinstance(x, bool) for x in told)):
            if len(told) != len(passages) or not {*told} <= {0, 1}:
                raise DataError(
                    f"{place}: gold must have one of true and false, or of 0 and 1, for each of the "
                    f"{len(passages)} passages, got {told}"
                )
            gold = [p for p, is_gold in zip(passages, told, strict=True) if is_gold]
        elif _whole(told):
            if wrong := [x for x in told if not 0 <= x < len(passages)]:
                raise DataError(f"{place}: gold is {wrong[0]} of {len(passages)} passages, from 0")
            if len({*told}) < len(told):
                raise DataError(
                    f"{place}: gold has a position twice in {told}; give each once, or a 0 or 1 for "
                    f"each of the {len(passages)} passages in every row"
                )
            gold = [passages[x] for x in told]
        else:
            gold = [p for p in passages if p.title in told]
            if wrong := {*map(str, told)} - {p.title for p in gold}:
                raise DataError(f"{place}: no passage has the title {min(wrong)!r} of gold")
        ids = dict.fromkeys(p.id for p in gold)
        return tuple(ids), tuple(dict.fromkeys(p.title for p in gold if p.title))

    def _value(self, row: Row, name: str) -> Any:
        """Returns the value of a column; None if the column is not configured."""
        found: Any = row
        path = getattr(self, name)
        for part in path.split(".") if path else ():
            found = _inside(found, part, f"columns.{name} is {path!r}")
        return found if path else None


def _inside(value: Any, name: str, what: str) -> Any:
    if isinstance(value, list):
        return [_inside(one, name, what) for one in value]
    if not isinstance(value, Mapping) or name not in value:
        has = f"has {', '.join(value)}" if isinstance(value, Mapping) else "has no columns"
        raise KeyError(f"{what}, and what it looks into {has}")
    return value[name]


def _several(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _given(value: Any) -> list:
    """Returns `_several` without nulls."""
    return [one for one in _several(value) if one is not None]


def _whole(values: list) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text(value: Any) -> str:
    return " ".join(map(str.strip, value)) if isinstance(value, list) else text_of(value)


def _answer(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
