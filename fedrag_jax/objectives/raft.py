"""RAFT: learning to read the gold passage among distractors (Zhang et al. 2024, 2403.10131).

A share P of the questions has its gold (oracle) passages D* among distractors, the others only
distractors. The target A* is reasoning that quotes the gold passages, and then the answer:

    P of the questions   Q + D* + D_1 ... D_D  ->  A*
    the others           Q + D_1 ... D_(D+1)   ->  A*

With P = 1, no distractors and no reasoning it is `oracle` training, on only the gold passages.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Example, Passage, embedding_text, require_golds
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.generator import AnswerLoss
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.retrieval.retriever import Retriever


def recorded(example: Example, passages: Sequence[Passage]) -> str:
    """The teacher that returns the reasoning in the data set, `example.reasoning`."""
    return example.reasoning


def raft(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    prompts: Prompts,
    retriever: Retriever,
    questions: Sequence[Example],
    *,
    oracle_share: float = 0.8,
    distractors: int = 4,
    hard: bool = False,
    teacher: Callable[[Example, Sequence[Passage]], str] | None = recorded,
    seed: int = 0,
) -> Task:
    """NLL of reasoning and answer given one prompt with gold passages and distractors.

    A prompt has distractors + 1 passages, or as many as there are gold passages if those are more.

    Args:
      questions: all training examples; they determine the widths of the table. Others, which may be
        held out, get prompts of the same kind in a table of their own widths.
      oracle_share: P, the probability that the gold passages of a question are in its prompt.
      distractors: D; one less for every gold passage beyond the first.
      hard: use the passages nearest to the question without any of its answers, instead of random
        passages of the corpus.
      teacher: `teacher(example, gold passages) -> reasoning`, called once per question; it returns ""
        for no reasoning. None trains on answers only. The prompt style defines the mark after the
        reasoning.
      seed: random seed of the prompts; draws depend on the example's id, not on the client.

    Raises:
      ConfigError: a share outside [0, 1], distractors below 0, or reasoning in a style without it.
      DataError: questions without a gold passage, or a corpus with too few distractors.
    """
    rows: dict[str, np.ndarray] = {}
    reasoning: dict[str, str] = {}

    def learn(examples):
        rows.update(raft_rows(retriever, examples, oracle_share, distractors, hard=hard, seed=seed))
        golds = _gold_rows(retriever.passages, examples)
        for example, gold in zip(examples, golds, strict=True):
            passages = [retriever.passages[r] for r in gold] if teacher else []
            reasoning[example.id] = teacher(example, passages) if teacher else ""

    learn(questions)
    trained = prompts.wide_enough_for(questions, [reasoning[e.id] for e in questions])
    places = max(map(len, rows.values()), default=0)

    def collate(examples, _):
        if held_out := [e for e in examples if e.id not in rows]:
            learn(held_out)
        why = [reasoning[e.id] for e in examples]
        read = [rows[e.id] for e in examples]
        most = max(places, *map(len, read))
        read = [np.pad(row, (0, most - len(row)), constant_values=-1) for row in read]
        return trained.wide_enough_for(examples, why).training_table(
            examples, np.stack(read), per_passage=False, reasoning=why
        )

    loss, trainable = AnswerLoss(decoder), {"adapters": adapters}
    return Task("raft", trainable, {"decoder": params}, loss, collate, cost=loss.cost())


def oracle(
    decoder: Network,
    params: PyTree,
    adapters: PyTree,
    prompts: Prompts,
    retriever: Retriever,
    questions: Sequence[Example],
) -> Task:
    """Answer NLL given only the gold passages: the reader with a perfect retriever."""
    task = raft(
        decoder, params, adapters, prompts, retriever, questions,
        oracle_share=1.0, distractors=0, teacher=None,
    )  # fmt: skip
    return dataclasses.replace(task, name="oracle", label="generator: oracle")


def raft_rows(
    retriever: Retriever,
    questions: Sequence[Example],
    oracle_share: float = 0.8,
    distractors: int = 4,
    *,
    hard: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Returns corpus rows int [k] of each question's prompt by its id, in reading order; -1 for none.

    The presence of gold passages, the choice of distractors and the order are three separate draws, so
    that a larger share adds gold passages and changes no other prompt.

    Args, Raises: as for `raft`.
    """
    if not 0 <= oracle_share <= 1:
        raise ConfigError(f"raft: oracle_share must be between 0 and 1, got {oracle_share}")
    if distractors < 0:
        raise ConfigError(f"raft: distractors must be at least 0, got {distractors}")
    golds = _gold_rows(retriever.passages, questions)
    places = [max(distractors + 1, len(gold)) for gold in golds]
    others = (_nearest if hard else _drawn)(retriever, questions, golds, places, seed)
    rows = {}
    for example, gold, wrong, count in zip(questions, golds, others, places, strict=True):
        draw = _stream(seed, "raft oracle", example).random()
        shown = gold if draw < oracle_share else []
        read = np.array([*shown, *wrong][:count], np.int32)
        if len(read) < count:
            raise DataError(
                f"raft: question {example.id!r} needs {count - len(shown)} distractors, but the corpus "
                f"has {len(wrong)}: give more passages or lower `distractors`"
            )
        read = _stream(seed, "raft order", example).permutation(read)
        rows[example.id] = np.pad(read, (0, max(places) - count), constant_values=-1)
    return rows


def _gold_rows(passages: Sequence[Passage], questions: Sequence[Example]) -> list[list[int]]:
    remedy = "give them, or train on retrieved passages (`concatenated`)"
    require_golds(questions, f"RAFT needs positive_ids; {remedy}")
    row = {passage.id: i for i, passage in enumerate(passages)}
    return [[row[p] for p in e.positive_ids] for e in questions]


def _drawn(retriever, questions, golds, places, seed) -> list[list[int]]:
    """Draws distractors from the whole corpus, all equally likely; fewer if there are no more."""
    size, found = len(retriever.passages), []
    for example, gold, count in zip(questions, golds, places, strict=True):
        rng = _stream(seed, "raft distractors", example)
        drawn = rng.choice(size, min(count + len(gold), size), replace=False)
        found.append([r for r in drawn if r not in gold][:count])
    return found


def _nearest(retriever, questions, golds, places, seed) -> list[list[int]]:
    """Returns hard distractors: near passages that contain no answer, gold or not."""
    size, found = len(retriever.passages), {}
    texts = [embedding_text(p) for p in retriever.passages]
    depth, asked = 2 * max(places), range(len(questions))
    while asked:
        depth = min(4 * depth, size)
        ranked, _ = retriever.search([questions[i].question for i in asked], depth)
        for i, nearest in zip(asked, ranked, strict=True):
            answers = "|".join(map(re.escape, questions[i].answers))
            telling = re.compile(rf"(?<!\w)({answers})(?!\w)", re.IGNORECASE)
            others = (r for r in nearest if r not in golds[i])
            found[i] = [r for r in others if not telling.search(texts[r])]
            found[i] = found[i][: places[i]]
        asked = [i for i in asked if len(found[i]) < places[i] and depth < size]
    return [found[i] for i in range(len(questions))]


def _stream(seed: int, name: str, example: Example) -> np.random.Generator:
    return stream(seed, name, zlib.crc32(example.id.encode()))
