"""Default splits into train, validation and test by hashes: the same everywhere, and stable when
questions are added.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

from fedrag_jax.data.examples import SPLITS, Example
from fedrag_jax.errors import DataError

HELD_OUT = 0.1  # of the training questions, for validation
HOTPOTQA_TRAIN, HOTPOTQA_VALIDATION = 1500, 200

Labelled = tuple[Example, str, str]  # an example, the name of its split or "", and "file:line"
Split = dict[str, list[Example]]


def side(identifier: str) -> str:
    """Returns the split of a question by the sha256 of its id: 70, 10 and 20 percent."""
    place = _fraction(identifier)
    return SPLITS[(place >= 0.7) + (place >= 0.8)]


def labelled(label: str, splits: dict[str, str], where: str) -> str:
    """Returns the split that a label names.

    Raises:
      DataError: an unknown label.
    """
    if label not in splits:
        raise DataError(f"{where}: split {label!r} is none of {', '.join(splits)}")
    return splits[label]


def with_validation(split: Split, by_topic: bool = False) -> Split:
    """Moves a tenth of the training questions to validation, if there is no validation split.

    Args:
      by_topic: move whole topics, in the order of the sha256 of their names, until a tenth is held out,
        so that no topic is in both splits; questions without a topic stay. Otherwise move questions by
        their ids.
    """
    if split["validation"]:
        return split
    train = split["train"]
    if by_topic:
        topics = held_out_topics(train)
        held_out = {e.id for e in train if e.topic in topics}
    else:
        # Salted: of unlabelled questions only those with a small hash are in train at all.
        held_out = {e.id for e in train if _fraction("validation " + e.id) < HELD_OUT}
    return split | {
        "train": [e for e in train if e.id not in held_out],
        "validation": [e for e in train if e.id in held_out],
    }


def held_out_topics(train: Sequence[Example]) -> set[str]:
    """Returns the held-out topics of `with_validation`."""
    sizes: dict[str, int] = {}
    for example in train:
        if example.topic:
            sizes[example.topic] = sizes.get(example.topic, 0) + 1
    held_out, held = set(), 0
    for topic in sorted(sizes, key=_hash):
        if held >= len(train) * HELD_OUT:
            break
        held_out.add(topic)
        held += sizes[topic]
    return held_out


def dealt(examples: Iterable[Example], name: Callable[[Example], str]) -> Split:
    """Puts each example into the split that `name` returns, keeping the order."""
    split: Split = {name: [] for name in SPLITS}
    for example in examples:
        split[name(example)].append(example)
    return split


def by_label(questions: Sequence[Labelled]) -> Split:
    """Splits questions by their labels, or by `side`; validation defaults to a tenth of train."""
    known = {split: split for split in SPLITS}
    places = {e.id: labelled(label, known, where) for e, label, where in questions if label}
    examples = (e for e, _, _ in questions)
    return with_validation(dealt(examples, lambda e: places.get(e.id) or side(e.id)))


def squad(questions: Sequence[Labelled]) -> Split:
    """See `datasets.load`."""
    known = {"train_44articles": "train", "train_sample": "train", "dev": "test"}
    places = {e.id: labelled(label, known, where) for e, label, where in questions}
    split = dealt((e for e, _, _ in questions), lambda e: places[e.id])
    return with_validation(split, by_topic=True)


def hotpotqa(questions: Sequence[Labelled]) -> Split:
    """See `datasets.load`."""
    order = sorted((e.id for e, _, _ in questions), key=_hash)
    rank = {identifier: i for i, identifier in enumerate(order)}

    def place(example):
        if rank[example.id] >= HOTPOTQA_TRAIN:
            return "test"
        chooses = rank[example.id] >= HOTPOTQA_TRAIN - HOTPOTQA_VALIDATION
        return "validation" if chooses else "train"

    return dealt((e for e, _, _ in questions), place)


def xquad(questions: Sequence[Labelled]) -> Split:
    """See `datasets.load`."""
    return dealt((e for e, _, _ in questions), lambda e: side(e.id.rpartition("-")[2]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    return int(_hash(text)[:13], 16) / 16**13
