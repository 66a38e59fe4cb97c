"""Evaluation of answers with citations.

The paper's citation accuracy (ALoFTRAG, 2501.11929, section 4.2) is 1 if the gold passage is among the
cited ones, so citing all passages always achieves it. Precision, recall and F1 are therefore reported
too.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.citations import cited
from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example, answering_rows, reading_text
from fedrag_jax.data.seeds import stream
from fedrag_jax.evaluation.metrics import score_answers
from fedrag_jax.objectives.citing import Context
from fedrag_jax.objectives.encoding import found_by
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever


def contexts_of(
    retriever: Retriever,
    examples: Sequence[Example],
    n: int,
    forced: bool = True,
    seed: int = 0,
    pool: Pool | None = None,
) -> tuple[list[Context], np.ndarray]:
    """Returns the n passages to read for each question, in random order, and which questions are hard.

    Args:
      forced: replace the last of the n passages by a gold one if there is none among them, as in the
        paper; otherwise the retrieved passages are read (end to end).
      seed: random seed of the order.
      pool: `pool(example)`: the corpus rows to choose from; default: all.

    Returns:
      Contexts, and bool [Q]: whether no gold passage is among the n nearest. A copy of the text of a
      gold passage counts as one.
    """
    answering = answering_rows(retriever.passages, examples)
    ranked, _ = found_by(retriever, examples, n, pool)
    contexts, hard = [], np.zeros(len(examples), bool)
    for i, (example, nearest, golds) in enumerate(zip(examples, ranked, answering, strict=True)):
        hard[i] = not np.isin(nearest, golds).any()
        shown = np.append(nearest[:-1], golds[0]) if forced and hard[i] else nearest
        shown = stream(seed, f"context of {example.id}").permutation(shown)
        cites = tuple(int(place) + 1 for place in np.flatnonzero(np.isin(shown, golds)))
        contexts.append(Context(shown.astype(np.int32), cites))
    return contexts, hard


def without_gold(
    retriever: Retriever,
    examples: Sequence[Example],
    n: int,
    seed: int = 0,
    pool: Pool | None = None,
) -> list[Context]:
    """Returns the n nearest passages that are neither gold nor copies of a gold passage's text, in
    random order; none of them is to be cited."""
    answering = answering_rows(retriever.passages, examples)
    most = max(map(len, answering), default=0)
    size = len(retriever.passages)
    if pool is not None:
        size = min((len(pool(e)) for e in examples), default=size)
    ranked, _ = found_by(retriever, examples, min(n + most, size), pool)
    contexts = []
    for example, nearest, golds in zip(examples, ranked, answering, strict=True):
        wrong = nearest[~np.isin(nearest, golds)][:n]
        shown = stream(seed, f"context of {example.id}").permutation(wrong)
        contexts.append(Context(shown.astype(np.int32), ()))
    return contexts


def evaluate_citing(
    system: RAGSystem,
    examples: Sequence[Example],
    contexts: Sequence[Context],
    judge: Callable[..., np.ndarray] | None = None,
    **sampling,
) -> dict[str, np.ndarray]:
    """Returns scores [Q] for reading these contexts: `em`, `f1`, and those of `citation_scores`.

    Args:
      judge: `judge(examples, texts, answers)`: verdicts [repeats, Q] on the answers given the gold
        passages, such as `judge.judged` with its author; each repeat is a score `judged_<i>`.
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
    answers = [reading.answer for reading in readings]
    scores = score_answers(answers, [e.answers for e in examples])
    if judge is not None:
        text = {p.id: reading_text(p) for p in system.retriever.passages}
        verdicts = judge(
            examples, ["\n".join(text[i] for i in e.positive_ids) for e in examples], answers
        )
        scores |= {f"judged_{i}": verdict for i, verdict in enumerate(verdicts)}
    return scores | citation_scores(named, [c.cites for c in contexts])


def citation_scores(
    named: Sequence[tuple[int, ...] | None], golds: Sequence[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Returns `citation`, `citation_precision`, `citation_recall`, `citation_f1`, `abstained` [Q].

    Args:
      named: cited numbers; () for an explicit citation of none, None for an invalid citation.
      golds: numbers of the gold passages; if there are none, citing none is correct.
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
