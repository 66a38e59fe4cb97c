"""Data sets in files of JSON lines: a user's own, or copies of named data sets.

A data set is two files, plain or gzipped, one JSON object per line:

    questions.jsonl   {"question", "answers": [...]} and, if known, "id" (default: the line),
                      "positive_ids": [...], "split": "train" | "validation" | "test", "topic",
                      "hops", "reasoning";
                      {"question", "unanswerable": true} if no passage answers it: scored by
                      `fedrag eval` as in SQuAD v2, and refused here, because questions are for training
    passages.jsonl    {"id", "text"} and, if known, "title", "topic"

The files are in their own folder, or together with other data sets as NAME.questions.jsonl and
NAME.passages.jsonl. Other fields are ignored.
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
    question_id,
    string_of,
    strings_of,
)
from fedrag_jax.errors import DataError

NAMED = ("squad", "hotpotqa")  # which no folder of a user is taken for
TOPICS = {"squad": "title", "xquad": "lang"}  # the field that tells the clients of a set apart
SPLIT = {"squad": splits.squad, "hotpotqa": splits.hotpotqa, "xquad": splits.xquad}


def read(name: str, files: tuple[Path, Path]) -> Dataset:
    """Reads the data set in two files, split by the rule of its name (see `datasets.load`),
    unchecked."""
    topic = TOPICS.get(name, "topic")
    passages = _passages(files[1], topic)
    questions = _questions(files[0], topic, hops=2 if name == "hotpotqa" else 1)
    split = SPLIT.get(name, splits.by_label)(questions)
    return Dataset(Path(name).resolve().name, passages, **split, origin=str(files[0]))


def places(name: str) -> list[str]:
    """Returns the possible file stems of a name: in its own folder, with others, or in FEDRAG_DATA.

    Raises:
      DataError: a folder with several data sets.
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
    """Returns the question and passage files of a data set; None if they are not found.

    Raises:
      DataError: as `places`.
    """
    for stem in places(name):
        questions, passages = jsonl_file(f"{stem}questions"), jsonl_file(f"{stem}passages")
        if questions and passages:
            return questions, passages
    return None


def shared_folder() -> Path:
    """Returns the folder of named data sets: $FEDRAG_DATA, or ../shared/data."""
    return Path(os.environ.get("FEDRAG_DATA", "../shared/data"))


def load_passages(path: str | os.PathLike) -> list[Passage]:
    """Reads the passages of a file such as `passages.jsonl` (or `.jsonl.gz`), without questions.

    Raises:
      DataError: a missing or empty file, a repeated id, or a line that does not follow the schema.
    """
    if not Path(path).is_file():
        raise DataError(f"no passages: {path} is not a file; give one such as passages.jsonl")
    return check_passages(_passages(Path(path), "topic"), os.fspath(path))


def load_questions(
    path: str | os.PathLike, passages: Sequence[Passage], needed: Sequence[str] = SPLITS
) -> Dataset:
    """Reads the questions of a file such as `questions.jsonl` (or `.jsonl.gz`) about given passages.

    They are split like those of a user's own folder. Unanswerable questions are left out with a
    warning. `positive_ids` become ids of passages, see `golds`; ids that name no passage are left out
    with a warning.

    Args:
      needed: as in `load`.

    Raises:
      DataError: a missing file, `positive_ids` none of which names a passage, or as in `load`.
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
    if message := found.message():
        warnings.warn(f"{path}: {message}; left out", stacklevel=2)
    placed = [
        (dataclasses.replace(example, positive_ids=ids), *more)
        for (example, *more), ids in zip(questions, found.found, strict=True)
    ]
    return check(Dataset(Path(path).name, passages, **splits.by_label(placed)), needed)


def _questions(path: Path, topic: str, hops: int) -> list[splits.Labelled]:
    """Returns (question, name of its split, "file:line") of each line.

    Args:
      hops: default number of hops.
    """
    questions = []
    for row, where in json_rows(path):
        own = row.get("hops", hops)
        if not isinstance(own, int) or own < 1:
            raise DataError(f"{where}: 'hops' must be a positive whole number, got {own!r}")
        example = Example(
            id=question_id(row, where),
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
