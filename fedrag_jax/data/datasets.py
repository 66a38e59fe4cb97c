"""Sets of questions and passages read from JSON lines: a user's folder or a named set.

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
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from fedrag_jax.data import synthetic
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

HOTPOTQA_TRAIN, HOTPOTQA_VALIDATION = 1500, 200
TOPICS = {
    "squad": "title",
    "xquad": "lang",
}  # the field that tells the clients of a named set apart


def load(name: str | os.PathLike, needed: Sequence[str] = SPLITS) -> Dataset:
    """Reads a set by its name or from a user's own folder, and checks it.

    `"squad"` and `"hotpotqa"` are read from the folder in the environment variable FEDRAG_DATA
    (default ../shared/data) and split as follows; every list keeps the order of the file.

      squad: test = dev. Train and validation are `train_44articles` and `train_sample`
        together: whole articles, in the order of the sha256 of their titles, go to validation until
        it holds a tenth of them (7 articles, 1,565 questions), so no article is in both. Questions
        of `train_sample` have no title and stay in train, with topic "".
      hotpotqa: in the order of the sha256 of the question id, 1,300 train, 200 validation, and the
        rest test. The topic is "": cluster the questions to tell clients apart.

      xquad: by the sha256 of the question id without its language, 70% train, 10% validation, 20%
        test, so that no question is in one and its translation in another. The topic is the language.

    `"world"` and `"chatty_world"` are made (`data.synthetic.WORLDS`).

    Any other name is a folder, a path prefix (`folder/NAME` for folder/NAME.questions.jsonl) or a
    set in FEDRAG_DATA. Its questions go where their `split` says. Without that field they go by the
    sha256 of their id, 70% train, 10% validation, 20% test, so that questions added later move none
    of the old ones. If no question is for validation, a tenth of train is, by the same hash.

    Args:
      needed: the splits that must have questions.

    Raises:
      DataError: files not found (names those looked for), a line that is not what the schema asks
        for (file and line), or anything `examples.check` refuses.
    """
    text = os.fspath(name)
    if text in synthetic.WORLDS:
        return dataclasses.replace(synthetic.generate(synthetic.WORLDS[text]), name=text)
    questions_path, passages_path = _find(text)
    topic = TOPICS.get(text, "topic")
    passages = _passages(passages_path, topic)
    questions = _questions(questions_path, topic, hops=2 if text == "hotpotqa" else 1)
    splits = {"squad": _split_squad, "hotpotqa": _split_hotpotqa, "xquad": _split_xquad}
    split = splits.get(text, _split_own)
    return check(Dataset(Path(text).resolve().name, passages, **split(questions)), needed)


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
    return check(Dataset(Path(path).name, passages, **_split_own(placed)), needed)


def _questions(path: Path, topic: str, hops: int) -> list[tuple[Example, str, str]]:
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


def _split_squad(questions) -> dict[str, list[Example]]:
    splits = {"train_44articles": "train", "train_sample": "train", "dev": "test"}
    sides = [_named(label, splits, where) for _, label, where in questions]
    articles: dict[str, int] = {}
    for (example, _, _), side in zip(questions, sides, strict=True):
        if side == "train" and example.topic:
            articles[example.topic] = articles.get(example.topic, 0) + 1
    held_out, held = set(), 0
    for article in sorted(articles, key=_hash):
        if held >= sides.count("train") / 10:
            break
        held_out.add(article)
        held += articles[article]
    result = {split: [] for split in SPLITS}
    for (example, _, _), side in zip(questions, sides, strict=True):
        validation = side == "train" and example.topic in held_out
        result["validation" if validation else side].append(example)
    return result


def _split_hotpotqa(questions) -> dict[str, list[Example]]:
    order = sorted((example.id for example, _, _ in questions), key=_hash)
    rank = {identifier: i for i, identifier in enumerate(order)}
    result = {split: [] for split in SPLITS}
    for example, _, _ in questions:
        if rank[example.id] >= HOTPOTQA_TRAIN:
            result["test"].append(example)
        elif rank[example.id] >= HOTPOTQA_TRAIN - HOTPOTQA_VALIDATION:
            result["validation"].append(example)
        else:
            result["train"].append(example)
    return result


def _split_xquad(questions) -> dict[str, list[Example]]:
    result = {split: [] for split in SPLITS}
    for example, _, _ in questions:
        result[side(example.id.rpartition("-")[2])].append(example)
    return result


def _split_own(questions) -> dict[str, list[Example]]:
    result = {split: [] for split in SPLITS}
    for example, label, where in questions:
        if label:
            result[_named(label, {split: split for split in SPLITS}, where)].append(example)
        else:
            result[side(example.id)].append(example)
    if not result["validation"]:
        train = result["train"]
        # Salted: of unlabelled questions only those with a small hash are in train at all.
        held_out = {e.id for e in train if _fraction("validation " + e.id) < 0.1}
        result["validation"] = [e for e in train if e.id in held_out]
        result["train"] = [e for e in train if e.id not in held_out]
    return result


def side(identifier: str) -> str:
    """The split of a question that does not say: by the sha256 of its id, 70, 10 and 20 percent."""
    place = _fraction(identifier)
    return SPLITS[(place >= 0.7) + (place >= 0.8)]


def _named(label: str, splits: dict[str, str], where: str) -> str:
    if label not in splits:
        raise DataError(f"{where}: split {label!r} is none of {', '.join(splits)}")
    return splits[label]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    return int(_hash(text)[:13], 16) / 16**13


def _find(name: str) -> tuple[Path, Path]:
    """The question and passage files of a set, wherever they may lie."""
    shared = Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
    places = [shared / name]
    if name not in ("squad", "hotpotqa"):
        places.insert(0, Path(name))
    looked_for = []
    for place in places:
        stems = [f"{place}/", f"{place}."]
        if place.is_dir():
            files = place.glob("*.questions.jsonl*")
            sets = sorted({f"{place}/{file.name.split('.questions.')[0]}" for file in files})
            if len(sets) > 1:
                raise DataError(f"{place} holds several sets; choose one: {', '.join(sets)}")
            stems += [f"{stem}." for stem in sets]
        for stem in stems:
            questions, passages = jsonl_file(f"{stem}questions"), jsonl_file(f"{stem}passages")
            if questions and passages:
                return questions, passages
            looked_for.append(f"{stem}questions.jsonl[.gz] with {stem}passages.jsonl[.gz]")
    raise DataError(
        f"no set {name!r}: looked for {'; '.join(looked_for)}. Give a folder that has both files, "
        f"or set FEDRAG_DATA (now {shared}) to the folder of the named sets"
    )
