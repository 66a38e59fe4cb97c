"""Finds the passages that gold ids name, even if texts have been split into several passages."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fedrag_jax.data.answers import normalize_answer, stands_in
from fedrag_jax.data.examples import Passage, reading_text
from fedrag_jax.errors import DataError


class Golds(NamedTuple):
    """The result of looking up gold ids.

    Attributes:
      found: the ids of passages for each question, without duplicates.
      named: the number of ids that the questions name.
      missing: the ids that name no passage.
      passages: the number of passages.
    """

    found: list[tuple[str, ...]]
    named: int
    missing: list[tuple[str, ...]]
    passages: int

    def message(self) -> str:
        """A message about the ids that name no passage; "" if there are none."""
        missing = [i for some in self.missing for i in some]
        if not missing:
            return ""
        return (
            f"{len(missing):,} of {self.named:,} positive_ids name none of the {self.passages:,} "
            f"passages, {missing[0]!r} first"
        )

    def require_some(self, where: str) -> None:
        """Refuses questions if none of their ids names a passage.

        Raises:
          DataError: there are ids, but none names a passage.
        """
        if self.named and not any(self.found):
            raise DataError(
                f"{where}: {self.message()}: give the ids of passages as `fedrag ask --json` prints "
                "them, or the ids of the indexed documents and lines"
            )


def golds(
    asked: Iterable[tuple[Sequence[str], Sequence[str]]], passages: Iterable[Passage]
) -> Golds:
    """Looks up the passages that questions name by id.

    If a text was split into ID#0, ID#1, ..., its id names the pieces that contain an answer as whole
    words, or all pieces if none does.

    Args:
      asked: (gold ids, answers) of each question.
    """
    named, pieces = {}, {}
    for passage in passages:
        named[passage.id] = [passage]
        text, _, number = passage.id.rpartition("#")
        if number.isdecimal():
            pieces.setdefault(text, []).append(passage)
    whose, found, missing, count = pieces | named, [], [], 0
    for ids, answers in asked:
        count += len(ids)
        missing.append(tuple(i for i in ids if i not in whose))
        some = [p.id for i in ids if i in whose for p in _with_an_answer(whose[i], answers)]
        found.append(tuple(dict.fromkeys(some)))
    return Golds(found, count, missing, len(named))


def _with_an_answer(pieces: list[Passage], answers: Sequence[str]) -> list[Passage]:
    if len(pieces) == 1:
        return pieces
    wanted = [normal for answer in answers if (normal := normalize_answer(answer))]
    texts = [normalize_answer(reading_text(p)) for p in pieces]
    return [
        p for p, text in zip(pieces, texts, strict=True) if any(stands_in(w, text) for w in wanted)
    ] or pieces
