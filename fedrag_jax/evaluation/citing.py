"""Answers that cite: are the right passages named, and no others, and is nothing made up?

The paper's citation accuracy (ALoFTRAG, 2501.11929, section 4.2) asks whether the gold passage is among
those cited, which citing all of them always achieves; precision, recall and F1 stand beside it.
"""

from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.citations import cited
from fedrag_jax.data.examples import Example
from fedrag_jax.data.seeds import stream
from fedrag_jax.evaluation.metrics import score_answers
from fedrag_jax.objectives.citing import Context
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever


def contexts_of(
    retriever: Retriever,
    examples: Sequence[Example],
    n: int,
    forced: bool = True,
    seed: int = 0,
) -> tuple[list[Context], np.ndarray]:
    """The n passages that are read for each question, in random order, and which were hard to find.

    Args:
      forced: put a gold passage in place of the last of the n where none is among them, as the paper
        does; else questions are read with what was found, from end to end.
      seed: of the order.

    Returns:
      Contexts, and bool [Q]: whether no gold passage is among the n nearest.
    """
    row = {p.id: i for i, p in enumerate(retriever.passages)}
    ranked, _ = retriever.search([e.question for e in examples], n)
    contexts, hard = [], np.zeros(len(examples), bool)
    for i, (example, nearest) in enumerate(zip(examples, ranked, strict=True)):
        golds = [row[p] for p in example.positive_ids]
        hard[i] = not np.isin(nearest, golds).any()
        shown = np.append(nearest[:-1], golds[0]) if forced and hard[i] else nearest
        shown = stream(seed, f"context of {example.id}").permutation(shown)
        cites = tuple(int(place) + 1 for place in np.flatnonzero(np.isin(shown, golds)))
        contexts.append(Context(shown.astype(np.int32), cites))
    return contexts, hard


def without_gold(
    retriever: Retriever, examples: Sequence[Example], n: int, seed: int = 0
) -> list[Context]:
    """The n nearest passages that are not gold, in random order: nothing to be cited."""
    row = {p.id: i for i, p in enumerate(retriever.passages)}
    most = max((len(e.positive_ids) for e in examples), default=0)
    depth = min(n + most, len(retriever.passages))
    ranked, _ = retriever.search([e.question for e in examples], depth)
    contexts = []
    for example, nearest in zip(examples, ranked, strict=True):
        wrong = nearest[~np.isin(nearest, [row[p] for p in example.positive_ids])][:n]
        shown = stream(seed, f"context of {example.id}").permutation(wrong)
        contexts.append(Context(shown.astype(np.int32), ()))
    return contexts


def evaluate_citing(
    system: RAGSystem, examples: Sequence[Example], contexts: Sequence[Context], **sampling
) -> dict[str, np.ndarray]:
    """Scores [Q] of reading those contexts: `em`, `f1`, and those of `citation_scores`.

    Args:
      sampling: options of `RAGSystem.read`.

    Raises:
      ConfigError: a prompt style that cites nothing.
    """
    system.prompts.require_citing()
    rows = [context.rows for context in contexts]
    readings = system.read([e.question for e in examples], rows, **sampling)
    named = [
        cited(reading.reasoning, len(c.rows)) for reading, c in zip(readings, contexts, strict=True)
    ]
    answers = score_answers([r.answer for r in readings], [e.answers for e in examples])
    return answers | citation_scores(named, [c.cites for c in contexts])


def citation_scores(
    named: Sequence[tuple[int, ...] | None], golds: Sequence[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """`citation`, `citation_precision`, `citation_recall`, `citation_f1`, `abstained` [Q].

    Args:
      named: numbers cited; () for none on purpose, None for no citation at all.
      golds: numbers of the gold passages; where there are none, whoever cites none is right.
    """
    scores = {"citation": [], "citation_precision": [], "citation_recall": [], "citation_f1": []}
    for numbers, gold in zip(named, golds, strict=True):
        told, wanted = {*(numbers or ())}, {*gold}
        right = len(told & wanted)
        if not wanted:
            found = [float(numbers == ())] * 4
        else:
            precision, recall = right / max(len(told), 1), right / len(wanted)
            both = 2 * right / (len(told) + len(wanted))
            found = [float(right > 0), precision, recall, both]
        for values, value in zip(scores.values(), found, strict=True):
            values.append(value)
    abstained = [float(numbers == ()) for numbers in named]
    return {n: np.array(x, np.float64) for n, x in (scores | {"abstained": abstained}).items()}
