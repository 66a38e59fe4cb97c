"""Reads a separate corpus for a data set, and finds the gold passages in it."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedrag_jax.data import documents, hub_tables, json_sets
from fedrag_jax.data.answers import normalize_answer, stands_in
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.file_kinds import READERS
from fedrag_jax.data.passage_table import PassageTable, pieces
from fedrag_jax.errors import ConfigError, DataError

COLUMNS = {"id": "id", "title": "title", "text": "text"}
DOCUMENT_TOKENS = 200  # of a passage of a document
# The beginning of the README of a data set on the hub.
CARD = re.compile(
    r"---\r?\n(?:(?!---).*\n)*?"
    r"(?:configs|dataset_info|license|pretty_name|size_categories|task_categories):"
)


def read(
    source: str,
    *,
    config: str = "",
    revision: str = "",
    columns: Mapping[str, str] = COLUMNS,
    tokenizer=None,
    tokens: int = 0,
) -> Sequence[Passage]:
    """Reads a corpus.

    Args:
      source: a hub repository, a copy of one, or a table (`hub_tables.table`), whose split "train" is
        read; a file of passages in JSON lines; or a folder of documents or a single document. A folder
        is a copy of a repository if it has the hub's README or tables; hidden files are ignored.
      columns: the columns of a table by field (`passage_table.FIELDS`).
      tokenizer: the encoder's tokenizer, for splitting texts.
      tokens: longer texts are split into passages of this many tokens, as `fedrag index` does; 0 for no
        split, or 200 for documents.

    Warns about files of other types in a folder of documents.

    Raises:
      DataError: the corpus cannot be read; a folder has tables beside documents; for a folder of
        documents the error names all unreadable files.
      ConfigError: texts are to be split and there is no tokenizer; a revision of local files, or a
        configuration of documents or JSON lines.
    """
    path = Path(source)
    lines = path.is_file() and ".jsonl" in path.suffixes
    texts = path.is_file() and not hub_tables.is_table(path)
    if lines or texts or (path.is_dir() and not _is_copy(path)):
        if config:
            raise ConfigError(f"corpus {source} has no configurations, so leave out {config!r}")
        hub_tables.commit(source, revision)
        if lines:
            return cut(json_sets.load_passages(path), tokenizer, tokens)
        return _documents(path, tokenizer, tokens or DOCUMENT_TOKENS)
    at = hub_tables.commit(source, revision)
    rows = hub_tables.table(source, config or None, hub_tables.ONLY_SPLIT, at, texts=True)
    table = PassageTable(rows, columns, hub_tables.origin(source, config, at))
    return cut(table, tokenizer, tokens)


def cut(passages: Sequence[Passage], tokenizer, tokens: int) -> Sequence[Passage]:
    """Splits texts into passages of at most `tokens` tokens; returns them unchanged for 0.

    Raises:
      ConfigError: no tokenizer.
    """
    if not tokens:
        return passages
    _require(tokenizer)
    if isinstance(passages, PassageTable):
        return passages.cut(tokenizer, tokens)
    return [piece for passage in passages for piece in pieces(passage, tokenizer, tokens)]


def _documents(path: Path, tokenizer, tokens: int) -> list[Passage]:
    _require(tokenizer)
    passages, faults = [], []
    there = documents.find(path)
    for file in there.files:
        try:
            found = documents.read(file, path)
        except DataError as error:
            faults.append(str(error))
            continue
        for document in found:
            passages += documents.split(document, tokenizer, tokens, tokens // 5)
    if faults:
        told = "\n".join(faults)
        raise DataError(
            f"{path}: {len(faults)} files cannot be read; move them elsewhere, or index the folder "
            f"with `fedrag index`, which leaves them out:\n{told}"
        )
    if left := there.left_out:
        first, why = next(iter(left.items()))
        warnings.warn(
            f"{path}: {len(left)} files are left out; the first is {first}: {why}", stacklevel=3
        )
    return passages


def _require(tokenizer) -> None:
    if tokenizer is None:
        raise ConfigError("texts are split by the encoder's tokens: give its tokenizer")


def _is_copy(folder: Path) -> bool:
    """Returns whether a folder is a copy of a hub repository; otherwise it is one of documents."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    some_tables = [path for path in files if hub_tables.is_table(path)]
    readme = folder / "README.md"
    if readme in files and CARD.match(readme.read_text(errors="replace")):
        return bool(some_tables)
    # JSON is also what programs keep beside documents, and JSON lines may be documents.
    tables = [path for path in some_tables if not {".json", ".jsonl"} & {*path.suffixes}]
    texts = [path for path in files if path.suffix.lower() in READERS]
    if tables and texts:
        raise DataError(
            f"{folder}: has tables ({tables[0].name}) and documents ({texts[0].name}), of which one "
            "kind would not be read: move one kind to another folder"
        )
    return bool(tables) or (bool(some_tables) and not texts)


class FoundGolds(NamedTuple):
    """Gold passages of questions in a separate corpus.

    Attributes:
      golds: ids of the gold passages of each question; empty if no page was found.
      titled: number of questions that name a page.
      found: number of questions with a page in the corpus.
      answered: number of questions with an answer in a passage of such a page.
    """

    golds: list[tuple[str, ...]]
    titled: int
    found: int
    answered: int

    def message(self) -> str:
        """A message with the numbers."""
        return (
            f"of {len(self.golds):,} questions {self.titled:,} name a page, {self.found:,} find it in "
            f"the corpus, {self.answered:,} with the answer in a passage of it"
        )


def find_golds(
    questions: Sequence[Example],
    titles: Mapping[str, Sequence[str]],
    passages: Sequence[Passage],
) -> FoundGolds:
    """Finds the gold passages of questions by the titles of their pages.

    The gold passages of a page are those that contain an answer, or its first passage if none does, as
    for the middle page of a two-hop question.

    Args:
      titles: titles of pages with the answer, by the question's id.
    """
    wanted = {key(title) for question in questions for title in titles.get(question.id, ())}
    pages: dict[str, list[int]] = {title: [] for title in wanted}
    for row, title in enumerate(_titles(passages)):
        if (known := key(title)) in pages:
            pages[known].append(row)
    texts: dict[str, list[tuple[str, str]]] = {}  # of a page, its passages' ids and normal forms
    golds, titled, found, answered = [], 0, 0, 0
    for question in questions:
        named = dict.fromkeys(key(title) for title in titles.get(question.id, ()))
        there = [title for title in named if pages[title]]
        answers = [normal for a in question.answers if (normal := normalize_answer(a))]
        some: list[str] = []
        stands = False
        for title in there:
            if title not in texts:
                read = [passages[row] for row in pages[title]]
                texts[title] = [(p.id, normalize_answer(p.text)) for p in read]
            holding = [i for i, t in texts[title] if any(stands_in(a, t) for a in answers)]
            stands |= bool(holding)
            some += holding or [texts[title][0][0]]
        golds.append(tuple(dict.fromkeys(some)))
        titled, found, answered = titled + bool(named), found + bool(there), answered + stands
    return FoundGolds(golds, titled, found, answered)


def key(title: str) -> str:
    """Returns a key that is equal for titles of one page: case, underscores and spaces are ignored."""
    return " ".join(title.replace("_", " ").casefold().split())


def _titles(passages: Sequence[Passage]) -> Iterable[str]:
    if isinstance(passages, PassageTable):
        return passages.column("title")
    return (passage.title for passage in passages)
