"""Questions, passages, and checks of a data set."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text."""

    id: str
    title: str
    text: str
    topic: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One question with its acceptable answers and its gold passages.

    Attributes:
      answers: alternative answers; training uses `answer`, scoring uses all of them.
      positive_ids: ids of the gold passages; empty if not labelled.
      topic: the label by which clients differ; "" if unknown.
      hops: number of passages that must be read together.
      reasoning: the steps from the gold passages to the answer, for training; "" if not given.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]
    topic: str = ""
    hops: int = 1
    reasoning: str = ""

    @property
    def answer(self) -> str:
        """The answer used in training: the first that is not empty.

        Raises:
          DataError: all answers are empty.
        """
        for answer in self.answers:
            if answer.strip():
                return answer
        raise DataError(
            f"question {self.id!r} has no answer to train on; give one or leave the question out"
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A corpus and questions about it, split into train, validation and test.

    Attributes:
      origin: the source, with the commit of a hub repository; "" for generated data.
    """

    name: str
    passages: Sequence[Passage]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    origin: str = ""


def embedding_text(passage: Passage) -> str:
    """Returns the text of a passage for an encoder: title, space, text; only the text without a
    title."""
    return f"{passage.title} {passage.text}" if passage.title else passage.text


def reading_text(passage: Passage) -> str:
    """Returns the text of a passage for a generator: with the title only if the text lacks it."""
    return passage.text if passage.title in passage.text else embedding_text(passage)


def clusters(golds: Sequence[Sequence[str]], passages: Sequence[Passage]) -> np.ndarray:
    """Returns int [Q], the cluster of each question: questions about one article or gold passage.

    Passages with the same title are one article. Questions of a cluster are not independent and are
    resampled together. A question without gold passages is a cluster of its own.

    Args:
      golds: ids of the gold passages of each question.
      passages: passages with titles; an id that is not among them is an article of its own.
    """
    from scipy.sparse import coo_array  # here, because they take half a second
    from scipy.sparse.csgraph import connected_components

    article = {p.id: p.title or p.id for p in passages}
    number: dict[str, int] = {}
    pairs = [
        (i, len(golds) + number.setdefault(article.get(gold, gold), len(number)))
        for i, some in enumerate(golds)
        for gold in some
    ]
    some, others = np.array(pairs, int).reshape(-1, 2).T
    size = len(golds) + len(number)
    graph = coo_array((np.ones(len(pairs)), (some, others)), shape=(size, size))
    _, found = connected_components(graph, directed=False)
    return np.unique(found[: len(golds)], return_inverse=True)[1]


def sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns `count` random examples in their order; all of them for 0 or if there are fewer.

    Files are sorted by article: the beginning of a file covers few articles, a sample covers all.
    """
    if not count or count >= len(examples):
        return [*examples]
    drawn = np.sort(stream(seed, "sample of examples").permutation(len(examples))[:count])
    return [examples[i] for i in drawn]


def text_of(value: object) -> str:
    """Returns a value of a table as a text; "" for none. Numbers are texts too, also 0."""
    return "" if value is None else str(value)


def half_character(text: str) -> str:
    """Returns the problem of a text that contains half a character (a lone surrogate); "" if none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"holds half a character ({half!r}): give the whole one, or leave it out"
    return ""


def require_whole(text: str, what: str) -> None:
    """Refuses a text that cannot be encoded.

    Args:
      what: a name of the text for the message.

    Raises:
      DataError: the text contains half a character (a lone surrogate).
    """
    if fault := half_character(text):
        raise DataError(f"{what} {fault}")


def require_golds(examples: Sequence[Example], remedy: str) -> None:
    """Refuses questions without gold passages.

    Args:
      remedy: end of the message, with the reason.

    Raises:
      DataError: there are some.
    """
    if bare := [e.id for e in examples if not e.positive_ids]:
        raise DataError(f"{len(bare)} questions name no gold passage, {bare[0]!r} first: {remedy}")


def content_hash(dataset: Dataset) -> str:
    """16 hex characters of the sha256 of every passage and question, in order.

    Name and origin are left out, so that equal content has an equal hash. The reasoning is left out
    because it is neither asked nor scored.
    """
    digest = hashlib.sha256()
    for part in ("passages", "train", "validation", "test"):
        digest.update(part.encode())
        for record in getattr(dataset, part):
            names = (field.name for field in dataclasses.fields(record))
            fields = [getattr(record, name) for name in names if name != "reasoning"]
            digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


SPLITS = ("train", "validation", "test")


def check(dataset: Dataset, needed: Sequence[str] = SPLITS) -> Dataset:
    """Returns the dataset if it can be used for training and testing.

    Args:
      needed: the splits that must have questions.

    Raises:
      DataError: no passages, a split without questions, an id used twice, a question without an
        answer, half a character, or a positive id that no passage has; the message names the id.
    """
    check_passages(dataset.passages, dataset.name)
    splits = {split: getattr(dataset, split) for split in SPLITS}
    wanted = {gold for some in splits.values() for example in some for gold in example.positive_ids}
    passage_ids = wanted.intersection(ids_of(dataset.passages))
    _unique((e.id for examples in splits.values() for e in examples), "question", dataset.name)
    for split, examples in splits.items():
        if split in needed and not examples:
            raise DataError(
                f"{dataset.name}: no question in split {split!r}; "
                f'mark some with "split": "{split}" or give more questions'
            )
        for example in examples:
            said = [example.question, *example.answers, example.reasoning]
            require_whole("".join(said), f"{dataset.name}: question {example.id!r}")
            if not any(answer.strip() for answer in example.answers):
                raise DataError(
                    f"{dataset.name}: question {example.id!r} has no answer to train on; "
                    "give at least one or leave the question out"
                )
            for positive in example.positive_ids:
                if positive not in passage_ids:
                    raise DataError(
                        f"{dataset.name}: question {example.id!r} has positive id {positive!r}, "
                        f"which none of the {len(dataset.passages):,} passages has"
                    )
    return dataset


def ids_of(passages: Sequence[Passage]) -> Iterable[str]:
    """Returns the ids of passages without reading the texts of a table
    (`passage_table.PassageTable`)."""
    column = getattr(passages, "column", None)
    return column("id") if column else (passage.id for passage in passages)


def answering_rows(passages: Sequence[Passage], examples: Sequence[Example]) -> list[list[int]]:
    """Returns the rows of each question's gold passages, followed by those of copies of their texts,
    which answer it as well."""
    row = {identifier: i for i, identifier in enumerate(ids_of(passages))}
    golds = [[row[p] for p in example.positive_ids] for example in examples]
    text = {gold: _content(passages[gold]) for gold in {gold for rows in golds for gold in rows}}
    same: dict[str, list[int]] = {content: [] for content in text.values()}
    for i, passage in enumerate(passages):
        if (content := _content(passage)) in same:
            same[content].append(i)
    return [[*dict.fromkeys([*rows, *(i for r in rows for i in same[text[r]])])] for rows in golds]


def _content(passage: Passage) -> str:
    return " ".join((passage.text or passage.title).split())


def check_passages(passages: Sequence[Passage], name: str) -> Sequence[Passage]:
    """Returns the passages if there are any, their ids are unique and their texts can be encoded.

    Raises:
      DataError: otherwise, with the id.
    """
    if not len(passages):
        raise DataError(f"{name}: the corpus is empty; give at least one passage")
    if hasattr(passages, "column"):  # a table, which was checked as it was opened
        return passages
    _unique((passage.id for passage in passages), "passage", name)
    for passage in passages:
        require_whole(passage.title + passage.text, f"{name}: passage {passage.id!r}")
    return passages


def _unique(ids: Iterable[str], kind: str, name: str) -> set[str]:
    seen: set[str] = set()
    for identifier in ids:
        if identifier in seen:
            raise DataError(f"{name}: {kind} id {identifier!r} occurs twice; ids must be unique")
        seen.add(identifier)
    return seen
