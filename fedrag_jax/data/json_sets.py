"""Sets of questions and passages in files of JSON lines: a user's own, or copies of named sets.

A set is two files, plain or gzipped, one JSON object per line:

    questions.jsonl   {"id", "question", "answers": [...]} and, if known, "positive_ids": [...],
                      "split": "train" | "validation" | "test", "topic", "hops", "reasoning";
                      {"id", "question", "unanswerable": true} where no passage tells: measured by
                      `fedrag eval` as in SQuAD v2, and refused here, where all are trained on
    passages.jsonl    {"id", "text"} and, if known, "title", "topic"

in a folder of their own, or side by side with other sets as NAME.questions.jsonl and
NAME.passages.jsonl. Fields not listed are ignored.
"""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from fedrag_jax.data import splits
from fedrag_jax.data.examples import SPLITS, Dataset, Example, Passage, check, check_passages
from fedrag_jax.data.golds import golds
from fedrag_jax.data.json_lines import (
    answers_of,
    json_rows,
    jsonl_file,
    string_of,
    strings_of,
)
from fedrag_jax.errors import DataError

NAMED = ("squad", "hotpotqa")  # which no folder of a user is taken for
TOPICS = {"squad": "title", "xquad": "lang"}  # the field that tells the clients of a set apart
SPLIT = {"squad": splits.squad, "hotpotqa": splits.hotpotqa, "xquad": splits.xquad}


def read(name: str, files: tuple[Path, Path]) -> Dataset:
    """The set of two files, split by the rule of its name (see `datasets.load`), not checked."""
    topic = TOPICS.get(name, "topic")
    passages = _passages(files[1], topic)
    questions = _questions(files[0], topic, hops=2 if name == "hotpotqa" else 1)
    split = SPLIT.get(name, splits.by_label)(questions)
    return Dataset(Path(name).resolve().name, passages, **split, origin=str(files[0]))


def places(name: str) -> list[str]:
    """Stems of the files that a name may mean: in its own folder, beside others, or in FEDRAG_DATA.

    Raises:
      DataError: a folder that holds several sets.
    """
    shared = shared_folder()
    folders = [shared / name] if name in NAMED else [Path(name), shared / name]
    stems = []
    for place in folders:
        stems += [f"{place}/", f"{place}."]
        if place.is_dir():
            files = place.glob("*.questions.jsonl*")
            sets = sorted({f"{place}/{file.name.split('.questions.')[0]}" for file in files})
            if len(sets) > 1:
                raise DataError(f"{place} holds several sets; choose one: {', '.join(sets)}")
            stems += [f"{stem}." for stem in sets]
    return stems


def find(name: str) -> tuple[Path, Path] | None:
    """The question and passage files of a set, wherever they may lie; None where they do not.

    Raises:
      DataError: as `places`.
    """
    for stem in places(name):
        questions, passages = jsonl_file(f"{stem}questions"), jsonl_file(f"{stem}passages")
        if questions and passages:
            return questions, passages
    return None


def shared_folder() -> Path:
    """The folder of named sets: environment variable FEDRAG_DATA, or ../shared/data."""
    return Path(os.environ.get("FEDRAG_DATA", "../shared/data"))


def load_passages(path: str | os.PathLike) -> list[Passage]:
    """The passages of a file such as `passages.jsonl` (or `.jsonl.gz`), for who has no questions.

    Raises:
      DataError: no such file, none in it, an id used twice, a line that is not as the schema has it.
    """
    if not Path(path).is_file():
        raise DataError(f"no passages: {path} is not a file; give one such as passages.jsonl")
    return check_passages(_passages(Path(path), "topic"), os.fspath(path))


def load_questions(
    path: str | os.PathLike, passages: Sequence[Passage], needed: Sequence[str] = SPLITS
) -> Dataset:
    """The questions of a file such as `questions.jsonl` (or `.jsonl.gz`) about passages that are given.

    They are split as those of a user's own folder. Unanswerable ones are left out, with a warning. The
    `positive_ids` of others become ids of passages, see `golds`; so are those left out that name none.

    Args:
      needed: as in `load`.

    Raises:
      DataError: no such file, none of the `positive_ids` names a passage, or as in `load`.
    """
    if not Path(path).is_file():
        raise DataError(f"no questions: {path} is not a file; give one such as questions.jsonl")
    everything, passages = _questions(Path(path), "topic", hops=1), [*passages]
    questions = [question for question in everything if question[0].answers]
    if count := len(everything) - len(questions):
        warnings.warn(
            f"{path}: {count:,} unanswerable questions have no answer to train on; left out",
            stacklevel=2,
        )
    found = golds(((e.positive_ids, e.answers) for e, _, _ in questions), passages)
    found.require_some(os.fspath(path))
    if told := found.told():
        warnings.warn(f"{path}: {told}; left out", stacklevel=2)
    placed = [
        (dataclasses.replace(example, positive_ids=ids), *more)
        for (example, *more), ids in zip(questions, found.found, strict=True)
    ]
    return check(Dataset(Path(path).name, passages, **splits.by_label(placed)), needed)


def _questions(path: Path, topic: str, hops: int) -> list[splits.Labelled]:
    """(question, name of its split, "file:line") of each line.

    Args:
      hops: of those that do not say.
    """
    questions = []
    for row, where in json_rows(path):
        own = row.get("hops", hops)
        if not isinstance(own, int) or own < 1:
            raise DataError(f"{where}: 'hops' must be a positive whole number, got {own!r}")
        example = Example(
            id=string_of(row, "id", where),
            question=string_of(row, "question", where),
            answers=answers_of(row, where),
            positive_ids=strings_of(row, "positive_ids", where, default=[]),
            topic=string_of(row, topic, where, default=""),
            hops=own,
            reasoning=string_of(row, "reasoning", where, default=""),
        )
        questions.append((example, string_of(row, "split", where, default=""), where))
    return questions


def _passages(path: Path, topic: str) -> list[Passage]:
    return [
        Passage(
            id=string_of(row, "id", where),
            title=string_of(row, "title", where, default=""),
            text=string_of(row, "text", where),
            topic=string_of(row, topic, where, default=""),
        )
        for row, where in json_rows(path)
    ]
