"""A fictional world with gold labels: deterministic, without downloads, unknown to any model.

People make works. A person's passage says where they were born, trained and settled (and when); a
work's passage says who made it, when, where it was shown and who owns it. One-hop questions ask for
one fact; two-hop questions ask about the maker of a work and need both passages. Every answer type
has at least 200 values, so that guessing scores almost nothing. Names that share a word are the hard
distractors: with `crowding` c, about c people of a topic share each family name, and up to c works
share each title word.

Questions are split by fact: a person and all their works belong to one split, so no fact in the test
questions occurs in training questions. All passages are in one corpus.

The reasoning of a question consists of the sentences of its gold passages that state the facts, in the
order in which they lead to the answer.
"""

import itertools
import math
import zlib
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.phrases import (
    CHATTER,
    JARGON,
    JUNK_PASSAGES,
    PERSON_PASSAGES,
    PLAIN,
    PLAIN_TWO_HOP,
    TOPICS,
    WORK_PASSAGES,
)
from fedrag_jax.errors import ConfigError

PERSON_FACTS = ("born_in", "trained_at", "settled_in", "settled_year")
WORK_FACTS = ("maker", "made_year", "shown_in", "owner")
ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr",
          "tr", "sh", "th")  # fmt: skip
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "n", "l", "r", "s", "k", "m", "t")
SYLLABLES = tuple(map("".join, itertools.product(ONSETS, VOWELS, CODAS)))


class WorldConfig(NamedTuple):
    """The settings of a world.

    Attributes:
      seed: random seed.
      side: "pretraining" or "test": two disjoint halves of all possible names.
      people, works: per topic.
      junk: passages without any fact.
      crowding: number of entities that share a name word; more make harder distractors.
      jargon: fraction of one-hop questions in the topic's own jargon.
      chatter: fraction of the other questions that are wrapped in the topic's own chatter.
      passage_chatter: fraction of a passage's sentences that are wrapped in the topic's chatter.
      questions: numbers of train, validation and test questions; a quarter of each is two-hop.
    """

    seed: int = 0
    side: str = "test"
    people: int = 96
    works: int = 96
    junk: int = 80
    crowding: float = 4.0
    jargon: float = 0.2
    chatter: float = 0.45
    passage_chatter: float = 0.0
    questions: tuple[int, int, int] = (1600, 400, 600)


class Entity(NamedTuple):
    """A person or a work with all facts of its passage."""

    id: str
    topic: int
    name: str
    facts: dict[str, str]
    maker: int | None  # index of the person who made it, for works


# By the names of their datasets. Chatty documents are what pretraining worlds never show.
WORLDS = {"world": WorldConfig(), "chatty_world": WorldConfig(passage_chatter=1.0)}


def generate(config: WorldConfig | None = None) -> Dataset:
    """Generates a world with its passages and questions.

    Raises:
      ConfigError: an unknown side, a number that no world has, or more questions than there are facts.
    """
    config = config or WorldConfig()
    if config.side not in ("pretraining", "test"):
        raise ConfigError(f"world side must be 'pretraining' or 'test', got {config.side!r}")
    least = min(config.seed, config.people - 1, config.works, *config.questions)
    if least < 0 or not any(config.questions) or not 0 < config.crowding < math.inf:
        raise ConfigError(
            "a world needs a seed and works of at least 0, at least 1 person and 1 question, and a "
            f"crowding above 0, got {config}"
        )
    rng = np.random.default_rng([config.seed, zlib.crc32(config.side.encode())])
    words = _Words(rng, config.side)
    people, works = _entities(config, rng, words)
    passages = [_passage(e, PERSON_PASSAGES, rng, config) for e in people]
    passages += [_passage(e, WORK_PASSAGES, rng, config) for e in works]
    passages += [
        Passage(
            f"junk-{i}",
            "",
            JUNK_PASSAGES[i % len(JUNK_PASSAGES)].format(x=words.new(), y=rng.integers(2, 99)),
        )
        for i in range(config.junk)
    ]
    order = rng.permutation(len(passages))
    splits = _questions(config, rng, people, works, {p.id: p.text for p in passages})
    return Dataset("world", [passages[i] for i in order], *splits)


class _Words:
    """Invented words. Names and titles consist of one-syllable words, which worlds share. Whole names,
    and the two-syllable words of cities and houses, always belong to one side.
    """

    def __init__(self, rng: np.random.Generator, side: str):
        self._rng, self._half, self._seen = rng, int(side == "test"), set()

    def ours(self, name: str) -> bool:
        """Returns whether a name belongs to this side; independent of the seed."""
        return zlib.crc32(name.encode()) % 2 == self._half

    def new(self) -> str:
        """Returns a new two-syllable word."""
        while True:
            word = "".join(self._rng.choice(SYLLABLES, size=2)).capitalize()
            if self.ours(word) and word not in self._seen:
                self._seen.add(word)
                return word

    def pool(self, size: int) -> list[str]:
        """Returns `size` new words."""
        return [self.new() for _ in range(size)]

    def short(self, size: int) -> list[str]:
        """Returns distinct one-syllable words."""
        return [w.capitalize() for w in self._rng.choice(SYLLABLES, size=size, replace=False)]

    def names(self, first: list[str], second: tuple[str, ...] | list[str], size: int) -> list[str]:
        """Returns new names of two words that belong to this side."""
        free = [f"{a} {b}" for a in first for b in second]
        free = [name for name in free if self.ours(name) and name not in self._seen]
        if len(free) < size:
            raise ConfigError(
                f"world: {len(free)} names for {size} people or works of a topic; lower `crowding`"
            )
        chosen = [free[i] for i in self._rng.permutation(len(free))[:size]]
        self._seen.update(chosen)
        return chosen


def _entities(config, rng, words) -> tuple[list[Entity], list[Entity]]:
    """Returns people, then the works they made."""
    cities = words.pool(240)
    schools = [f"{word} Academy" for word in words.pool(220)]
    houses = [f"House {word}" for word in words.pool(220)]
    years = [str(year) for year in range(1500, 1900)]
    given = words.short(min(len(SYLLABLES), max(8, config.people)))

    def facts(names: dict[str, list[str]]) -> dict[str, str]:
        return {name: str(rng.choice(values)) for name, values in names.items()}

    people, works = [], []
    for t, topic in enumerate(TOPICS):
        families = words.short(max(2, round(config.people / config.crowding)))
        for i, name in enumerate(words.names(given, families, config.people)):
            values = facts(
                {
                    "born_in": cities,
                    "trained_at": schools,
                    "settled_in": cities,
                    "settled_year": years,
                }
            )
            people.append(Entity(f"{topic.name}-person-{i}", t, name, values, None))
        # A title word serves three kinds of work at most, and half of the titles are ours.
        titles = words.short(max(4, round(2.5 * config.works / min(config.crowding, 3))))
        for i, name in enumerate(words.names(titles, topic.kinds, config.works)):
            maker = int(rng.integers(t * config.people, (t + 1) * config.people))
            values = facts({"made_year": years, "shown_in": cities, "owner": houses})
            values["maker"] = people[maker].name
            works.append(Entity(f"{topic.name}-work-{i}", t, name, values, maker))
    return people, works


def _passage(entity: Entity, patterns: tuple[str, ...], rng, config: WorldConfig) -> Passage:
    text = str(rng.choice(patterns)).format(**_vocabulary(entity), **entity.facts)
    if config.passage_chatter:
        lines = CHATTER[entity.topic]
        text = " ".join(
            str(rng.choice(lines)).format(q=s) if rng.random() < config.passage_chatter else s
            for s in _sentences(text)
        )
    return Passage(entity.id, entity.name, text, TOPICS[entity.topic].name)


def _sentences(text: str) -> list[str]:
    return [sentence.rstrip(".") + "." for sentence in text.split(". ")]


def _vocabulary(entity: Entity) -> dict[str, str]:
    return {**TOPICS[entity.topic]._asdict(), "n": entity.name, "w": entity.name}


def _questions(config, rng, people, works, texts) -> list[list[Example]]:
    """Returns train, validation and test questions; a person and their works are in one split."""
    sizes = np.array(config.questions)
    splits = rng.choice(3, size=len(people), p=sizes / sizes.sum())
    one_hop, two_hop = [[], [], []], [[], [], []]
    for p, person in enumerate(people):
        one_hop[splits[p]] += [(person, fact) for fact in PERSON_FACTS]
    for work in works:
        split = splits[work.maker]
        one_hop[split] += [(work, fact) for fact in WORK_FACTS]
        two_hop[split] += [(work, fact) for fact in PLAIN_TWO_HOP]

    result = []
    for split, size in enumerate(config.questions):
        quarter = size // 4
        examples = []
        for hops, pool, count in (
            (2, two_hop[split], quarter),
            (1, one_hop[split], size - quarter),
        ):
            if count > len(pool):
                raise ConfigError(
                    f"world of {len(people)} people and {len(works)} works has {len(pool)} "
                    f"{hops}-hop facts for split {split}, {count} asked for: lower `questions` or "
                    "raise `people` and `works`"
                )
            for i in rng.permutation(len(pool))[:count]:
                examples.append(_example(*pool[i], hops, config, people, rng, texts))
        result.append([examples[i] for i in rng.permutation(len(examples))])
    return result


def _example(entity: Entity, fact: str, hops: int, config, people, rng, texts) -> Example:
    topic = TOPICS[entity.topic]
    source, golds, told = entity, (entity.id,), []
    if hops == 2:
        source = people[entity.maker]
        golds = (entity.id, source.id)
        told = [_sentence(entity, "maker", texts)]
        pattern = str(rng.choice(PLAIN_TWO_HOP[fact]))
    elif rng.random() < config.jargon:
        pattern = JARGON[fact][entity.topic]
    else:
        pattern = str(rng.choice(PLAIN[fact]))
    if pattern not in JARGON[fact] and rng.random() < config.chatter:
        pattern = str(rng.choice(CHATTER[entity.topic])).format(q=pattern)
    return Example(
        id=f"{entity.id}-{fact}-{hops}",
        question=pattern.format(**_vocabulary(entity)),
        answers=(source.facts[fact],),
        positive_ids=golds,
        topic=topic.name,
        hops=hops,
        reasoning=" ".join([*told, _sentence(source, fact, texts)]),
    )


def _sentence(entity: Entity, fact: str, texts: dict[str, str]) -> str:
    """Returns the sentence of an entity's passage that states a fact."""
    patterns = WORK_PASSAGES if entity.maker is not None else PERSON_PASSAGES
    sentences = (s for pattern in patterns for s in _sentences(pattern))
    telling = (
        s.format(**_vocabulary(entity), **entity.facts) for s in sentences if f"{{{fact}}}" in s
    )
    return next(s for s in telling if s in texts[entity.id])
