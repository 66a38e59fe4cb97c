"""One system on one set of questions: answers, retrieval, and the controls that keep them honest."""

from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.examples import Example
from fedrag_jax.evaluation import metrics
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever

RANKED = 10  # passages searched for, as MRR@10 wants


def evaluate(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Per-question scores in [0, 1], each [Q]: `em`, `f1`, `recall_at_5`, `mrr`.

    Answers are greedy, from one prompt with the system's top-k passages.
    """
    questions = [e.question for e in examples]
    depth = min(max(RANKED, system.top_k), len(system.retriever.passages))
    rows, _ = system.retriever.search(questions, depth)
    scores = _answers(system, examples, rows[:, : system.top_k])
    return scores | rank_scores(system.retriever, examples, rows)


def rank_scores(
    retriever: Retriever, examples: Sequence[Example], rows, depths: Sequence[int] = (5,)
) -> dict[str, np.ndarray]:
    """`recall_at_<depth>` and `mrr` [Q] of corpus rows [Q, >= 10], best first."""
    golds = _gold_rows(retriever, examples)
    scores = {
        f"recall_at_{k}": metrics.recall_at_k(rows, golds, min(k, len(rows[0]))) for k in depths
    }
    return scores | {"mrr": metrics.mrr(rows, golds)}


def gold_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] when the gold passages alone are read: the ceiling of a perfect retriever."""
    return _answers(system, examples, [sorted(g) for g in _gold_rows(system.retriever, examples)])


def closed_book(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] without any passage: what the generator knows by heart."""
    return _answers(system, examples, [()] * len(examples))


def distractor_passage(system: RAGSystem, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`em`, `f1` [Q] when the nearest passage without the answer stands in for the gold one."""
    depth = min(50, len(system.retriever.passages))
    found, _ = system.retriever.search([e.question for e in examples], depth)
    golds = _gold_rows(system.retriever, examples)
    texts = [metrics.normalize_answer(p.text) for p in system.retriever.passages]
    rows = []
    for example, gold, ranked in zip(examples, golds, found, strict=True):
        answers = [metrics.normalize_answer(a) for a in example.answers]
        usable = (r for r in ranked if r not in gold and not any(a in texts[r] for a in answers))
        rows.append([next(usable)])
    return _answers(system, examples, rows)


def _answers(system, examples, rows) -> dict[str, np.ndarray]:
    predictions = system.answer([e.question for e in examples], rows)
    return metrics.score_answers(predictions, [e.answers for e in examples])


def _gold_rows(retriever, examples) -> list[set[int]]:
    row = {p.id: i for i, p in enumerate(retriever.passages)}
    return [{row[i] for i in e.positive_ids} for e in examples]
