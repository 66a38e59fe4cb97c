"""Scores of rankings, one per question: float64 [Q] with values in [0, 1].

`ranked` [Q, >= k] holds passage ids (or store rows), best first; `golds` has for each question its gold
ids of the same kind, or their grades by id, of which those above 0 are gold. Names differ between
fields: `recall_at_k` is trec_eval's `success`, `recall_fraction_at_k` its `recall`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fedrag_jax.data.answers import normalize_answer, stands_in
from fedrag_jax.errors import ConfigError, DataError


def recall_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: 1 if any gold passage is among the first k (elsewhere hit or success@k)."""
    return _per_question(lambda top, gold: bool(gold.keys() & set(top)), ranked, golds, k)


def recall_all_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: 1 if every gold passage is among the first k."""
    return _per_question(lambda top, gold: gold.keys() <= set(top), ranked, golds, k)


def recall_fraction_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: share of the gold passages that are among the first k."""
    return _per_question(
        lambda top, gold: len(gold.keys() & set(top)) / len(gold), ranked, golds, k
    )


def mrr(ranked, golds: Sequence[Collection], k: int = 10) -> np.ndarray:
    """[Q]: 1 / rank of the first gold passage, 0 if it is not among the first k (MRR@10).

    A ranking with fewer than k passages is allowed, for small corpora.
    """

    def reciprocal_rank(top, gold):
        return next((1 / rank for rank, p in enumerate(top, start=1) if p in gold), 0.0)

    return _per_question(reciprocal_rank, ranked, golds, min(k, _width(ranked)))


def ndcg(ranked, golds: Sequence[Collection], k: int = 10) -> np.ndarray:
    """[Q]: normalised discounted cumulative gain of the first k, as trec_eval's `ndcg_cut` (nDCG@10).

        DCG = sum over ranks r of grade / log2(r + 1)

    divided by the DCG of the best possible ranking.
    """

    def gain(top, gold):
        discounts = 1 / np.log2(np.arange(2, k + 2))
        found = np.array([gold.get(p, 0.0) for p in top]) @ discounts[: len(top)]
        best = sorted(gold.values(), reverse=True)[:k]
        return found / (best @ discounts[: len(best)])

    return _per_question(gain, ranked, golds, min(k, _width(ranked)))


def average_precision(ranked, golds: Sequence[Collection]) -> np.ndarray:
    """[Q]: mean over gold passages of the precision where each is found, 0 where it is not (MAP)."""

    def precision(top, gold):
        hits = np.array([p in gold for p in top])
        return (hits * np.cumsum(hits) / np.arange(1, len(top) + 1)).sum() / len(gold)

    return _per_question(precision, ranked, golds, _width(ranked))


def answer_recall_at_k(
    ranked, texts: Sequence[str], answers: Sequence[Sequence[str]], k: int
) -> np.ndarray:
    """[Q]: 1 if one of the first k passages contains an answer, gold or not.

    `ranked` [Q, >= k] are rows of `texts` [N]. Both sides are normalised like answers, and whole words
    must match. An answer that normalisation makes empty, such as "A", is matched literally, ignoring
    case.
    """
    ranked = _first(ranked, k, len(answers))
    if not all(0 <= row < len(texts) for top in ranked for row in top):
        raise ConfigError(f"ranked must be rows of the {len(texts)} texts, from 0")
    if any(isinstance(alternatives, str) for alternatives in answers):
        raise DataError("answers must be lists of strings, one list for each question")
    padded: dict[int, str] = {}
    for row in {row for top in ranked for row in top}:
        padded[row] = f" {normalize_answer(texts[row])} "
    scores = np.zeros(len(ranked))
    for i, (top, alternatives) in enumerate(zip(ranked, answers, strict=True)):
        wanted = [f" {a} " for a in map(normalize_answer, alternatives) if a]
        bare = [a for a in alternatives if a.strip() and not normalize_answer(a)]
        scores[i] = any(answer in padded[row] for row in top for answer in wanted) or any(
            stands_in(answer, texts[row]) for row in top for answer in bare
        )
    return scores


def _per_question(score: Callable, ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """Applies a score to the first k ids of each question and its gold ids with their grades."""
    ranked, scores = _first(ranked, k, len(golds)), np.zeros(len(golds))
    for i, (top, gold) in enumerate(zip(ranked, golds, strict=True)):
        grades = gold if isinstance(gold, Mapping) else dict.fromkeys(gold, 1.0)
        grades = {p: grade for p, grade in grades.items() if grade > 0}
        if len({*top}) < len(top):
            raise DataError(
                f"question number {i} (from 0) has a passage twice in its ranking: {top}"
            )
        if isinstance(gold, str) or not grades:
            raise DataError(
                f"question number {i} (from 0) has gold passages {gold!r}; ranking is scored only "
                "over questions with at least one gold id: leave the others out"
            )
        scores[i] = score(top, grades)
    return scores


def _width(ranked) -> int:
    widths = {len(row) for row in ranked}
    if len(widths) > 1:
        raise ConfigError("ranked must have equally many passages for every question")
    return widths.pop() if widths else np.shape(ranked)[-1]


def _first(ranked, k: int, questions: int) -> list[list]:
    _width(ranked)
    ranked = np.asarray(ranked)
    if ranked.ndim != 2 or len(ranked) != questions:
        raise ConfigError(
            f"ranked must have one row for each of {questions} questions, has shape {ranked.shape}"
        )
    if not 1 <= k <= ranked.shape[1]:
        raise ConfigError(f"k must be between 1 and the {ranked.shape[1]} passages ranked, got {k}")
    return ranked[:, :k].tolist()
