"""Reads questions and passages of a benchmark from the hub, a copy of it, or local JSON lines."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedrag_jax.data import hub_tables
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.hub_rows import Question, beir_document
from fedrag_jax.data.json_lines import (
    answers_of,
    field_of,
    json_rows,
    jsonl_file,
    question_id,
    string_of,
    strings_of,
)
from fedrag_jax.data.json_sets import load_passages, shared_folder
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.benchmarks.sets import BenchmarkSet


class Material(NamedTuple):
    """The data of a benchmark for one run.

    Attributes:
      asked: all questions of the split.
      shown: questions of another split for few-shot examples.
      passages: all passages of the split's questions, without duplicates; may be empty.
      origin: the source: a file, a folder, or the name on the hub.
    """

    asked: list[Question]
    shown: list[Question]
    passages: list[Passage]
    origin: str

    @property
    def content(self) -> str:
        """16 hex characters of the sha256 of every question (the asked and scored parts) and passage,
        in order."""
        digest = hashlib.sha256()
        for records in (self.asked, self.shown, self.passages):
            digest.update(b"\n")
            for record in records:
                digest.update(json.dumps(_scored(record)).encode())
        return digest.hexdigest()[:16]


def read(
    known: BenchmarkSet,
    split: str = "",
    source: str | os.PathLike | None = None,
    shown: bool = False,
) -> Material:
    """Reads a split of a benchmark, every question with its labels.

    Local files are `NAME.questions.jsonl` or `NAME.jsonl`, with `NAME.passages.jsonl` if there are
    passages, plain or gzipped, in the schema of `data.datasets`; questions of the kind "choices" have
    `choices` and `answer`, the position of the correct one from 0.

    Args:
      split: the hub's name of the split; "" for the benchmark's own.
      source: "hub"; "local" for the folder $FEDRAG_DATA; another folder with local files or copies of
        hub repositories (`FOLDER/OWNER/NAME`); or the local file of questions. None for "local" if it
        has the benchmark, else the hub.
      shown: whether to read few-shot examples too.

    Raises:
      ConfigError: the package `datasets` is missing, or the benchmark has no examples.
      DataError: no data, a split without labels, or a row of another format.
    """
    split = split or known.split
    if shown and known.shown == split:
        raise ConfigError(
            f"{known.name}: examples in the prompt come from split {split!r}, so ask another or shots=0"
        )
    if local := _local(known, source):
        where = _LocalFiles(known, local)
    else:
        copy = None if source in (None, "hub") else Path(source) / known.repo
        where = _Hub(known, str(copy or known.repo), {})
    asked, passages = where.questions(split), where.passages(split)
    examples = where.questions(known.shown) if shown and known.shown else []
    for kind, ids in (("question", asked), ("passage", passages)):
        twice = next((i for i, n in Counter(one.id for one in ids).items() if n > 1), None)
        if twice is not None:
            raise DataError(f"{where.origin}: {kind} id {twice!r} occurs twice; ids must be unique")
    if not asked:
        raise DataError(f"{where.origin}: no question in split {split!r}")
    for question in [*asked, *examples]:
        if fault := _unlabelled(known, question):
            raise DataError(
                f"{where.origin}: question {question.id!r} has no {fault}: its split is without "
                f"labels; ask split {known.split!r}"
            )
    return Material(asked, examples, passages, where.origin)


def _scored(record: Question | Passage) -> tuple:
    if isinstance(record, Passage):
        return dataclasses.astuple(record)
    q = record
    return q.id, q.question, q.answers, q.choices, q.label, q.golds, q.group


def _unlabelled(known: BenchmarkSet, question: Question) -> str:
    """Returns the label that a question lacks for scoring; "" if none."""
    if known.kind == "open":
        return "" if question.answers or known.rule == "squad_v2" else "answer"
    if known.kind == "retrieval":
        return "" if question.golds else "relevant passage"
    return "" if question.label is not None else "right choice"


def _local(known: BenchmarkSet, source) -> Path | None:
    """Returns the local questions file of a benchmark; None for the hub or a copy of it."""
    if source == "hub":
        return None
    if source not in (None, "local") and Path(source).is_file():
        return Path(source)
    folder = shared_folder() if source in (None, "local") else Path(source)
    stems = [folder / f"{known.name}.questions", folder / known.name]
    found = next(filter(None, map(jsonl_file, map(str, stems))), None)
    if found or source is None or (source != "local" and (folder / known.repo).is_dir()):
        return found
    raise DataError(
        f"no set {known.name!r} in {folder}: looked for {known.name}.questions.jsonl[.gz], "
        f"{known.name}.jsonl[.gz] and a copy of the hub's {known.repo}/; set FEDRAG_DATA to the folder "
        "of the local sets, give another as source, or take source='hub'"
    )


# --- local files -----------------------------------------------------------------------------------


class _LocalFiles(NamedTuple):
    known: BenchmarkSet
    path: Path

    @property
    def origin(self) -> str:
        return str(self.path)

    def questions(self, split: str) -> list[Question]:
        known, found, seen = self.known, [], set()
        for row, where in json_rows(self.path):
            question, label = self._question(row, where), string_of(row, "split", where, "")
            if not label:
                label = known.split if known.side is None or known.only else known.side(question.id)
            seen.add(known.known_as.get(label, label))
            if known.known_as.get(label, label) == split:
                found.append(question)
        if not found:
            raise DataError(
                f"{self.path}: no question in split {split!r}, only in {sorted(seen)}: ask one of "
                "those, or all of a file of your own (fedrag eval --all)"
            )
        return found

    def passages(self, split: str) -> list[Passage]:
        stem = self.path.name.split(".questions.")[0].split(".jsonl")[0]
        path = jsonl_file(str(self.path.with_name(f"{stem}.passages")))
        return load_passages(path) if path else []

    def _question(self, row: Mapping[str, Any], where: str) -> Question:
        known = self.known
        answers, choices, label = (), (), None
        if known.kind == "choices":
            choices, label = strings_of(row, "choices", where), field_of(row, "answer", where, None)
            if not isinstance(label, int) or not 0 <= label < len(choices):
                raise DataError(
                    f"{where}: 'answer' must be the position of one of {len(choices)} choices, from 0, "
                    f"got {label!r}"
                )
        elif known.kind == "labels":
            choices, told = known.labels, strings_of(row, "answers", where)
            if len(told) != 1 or told[0] not in choices:
                raise DataError(f"{where}: 'answers' must be one of {[*choices]}, got {[*told]}")
            label = choices.index(told[0])
        elif known.kind == "open":
            answers = strings_of(row, "answers", where) if known.repo else answers_of(row, where)
        golds = known.golds if known.golds in row else "positive_ids"
        return Question(
            question_id(row, where),
            string_of(row, "question", where),
            answers,
            choices,
            label,
            strings_of(row, golds, where, default=[]),
            string_of(row, known.group, where) if known.group else "",
        )


# --- the hub, or a copy of it ----------------------------------------------------------------------


class _Hub(NamedTuple):
    """A repository read with the package `datasets`, by name or from a folder."""

    known: BenchmarkSet
    repo: str
    read: dict[str, list[tuple[Question, list[Passage]]]]

    @property
    def origin(self) -> str:
        return self.repo + (f", {self.known.config}" if self.known.config else "")

    def questions(self, split: str) -> list[Question]:
        return [question for question, _ in self._rows(split)]

    def passages(self, split: str) -> list[Passage]:
        if self.known.kind == "retrieval":
            return [*self._converted("corpus", "corpus", lambda row, place: beir_document(row))]
        each = {p.id: p for _, some in self._rows(split) for p in some}
        return list(each.values())

    def _rows(self, split: str) -> list[tuple[Question, list[Passage]]]:
        if split not in self.read:
            self.read[split] = (
                self._relevant(split) if self.known.kind == "retrieval" else self._of(split)
            )
        return self.read[split]

    def _of(self, split: str) -> list[tuple[Question, list[Passage]]]:
        known = self.known
        rows = self._converted(known.config, known.only or split, known.convert)
        return [r for r in rows if known.side is None or known.side(r[0].id) == split]

    def _relevant(self, split: str) -> list[tuple[Question, list[Passage]]]:
        """For BEIR: returns the queries of all splits, and the relevant documents of this split."""
        golds: dict[str, list[str]] = {}
        pairs = self._converted(
            "default", split,
            lambda row, place: (str(row["query-id"]), str(row["corpus-id"]), float(row["score"])),
        )  # fmt: skip
        for query, document, grade in pairs:
            if grade > 0:
                golds.setdefault(query, []).append(document)
        rows = self._converted("queries", "queries", self.known.convert)
        return [
            (dataclasses.replace(q, golds=tuple(golds[q.id])), p) for q, p in rows if q.id in golds
        ]

    def _converted(self, config: str | None, split: str, convert) -> Iterator:
        rows = hub_tables.table(self.repo, config, split)
        return hub_tables.converted(rows, convert, self.repo, split, self.known.name)
