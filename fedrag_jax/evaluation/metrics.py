"""Scores of answers and of rankings, one per question.

Every function over many questions returns float64 [Q] with values in [0, 1], ready for
`significance.bootstrap_interval`; tables print `percent` of it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from fedrag_jax.data.answers import normalize_answer
from fedrag_jax.errors import ConfigError, DataError


def percent(scores: np.ndarray) -> float:
    """100 × the mean over all questions (and seeds, if there is an axis for them)."""
    scores = np.asarray(scores, np.float64)
    if not scores.size:
        raise DataError("no question was scored: an average over nothing has no value")
    return float(100 * scores.mean())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after normalisation (SQuAD v1.1), else 0.0."""
    return _best(lambda p, a: float(p == a), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Overlap of the bags of normalised words, best over the answers (SQuAD v1.1), in [0, 1]."""
    return _best(_word_f1, prediction, answers)


def score_answers(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """{"em": [Q], "f1": [Q]} of one prediction per question against all of its answers."""
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "em": np.array([exact_match(p, a) for p, a in pairs], np.float64),
        "f1": np.array([f1(p, a) for p, a in pairs], np.float64),
    }


def _word_f1(prediction: str, answer: str) -> float:
    predicted, wanted = prediction.split(), answer.split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    if isinstance(answers, str) or not answers:
        raise DataError(f"answers must be a list of at least one string, got {answers!r}")
    prediction = normalize_answer(prediction)
    return max(score(prediction, normalize_answer(answer)) for answer in answers)


# Rankings. `ranked` [Q, >= k] holds passage ids (or store rows), best first; `golds` has for each
# question its gold ids of the same kind.


def recall_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: 1 if any gold passage is among the first k (elsewhere hit or success@k)."""
    return _per_question(lambda top, gold: bool(gold & set(top)), ranked, golds, k)


def recall_all_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: 1 if every gold passage is among the first k."""
    return _per_question(lambda top, gold: gold <= set(top), ranked, golds, k)


def recall_fraction_at_k(ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    """[Q]: share of the gold passages that are among the first k."""
    return _per_question(lambda top, gold: len(gold & set(top)) / len(gold), ranked, golds, k)


def mrr(ranked, golds: Sequence[Collection], k: int = 10) -> np.ndarray:
    """[Q]: 1 / rank of the first gold passage, 0 if it is not among the first k (MRR@10).

    A ranking of fewer than k counts as it is: right for a corpus that is no larger.
    """

    def reciprocal_rank(top, gold):
        return next((1 / rank for rank, p in enumerate(top, start=1) if p in gold), 0.0)

    return _per_question(reciprocal_rank, ranked, golds, min(k, np.shape(ranked)[-1]))


def answer_recall_at_k(
    ranked, texts: Sequence[str], answers: Sequence[Sequence[str]], k: int
) -> np.ndarray:
    """[Q]: 1 if one of the first k passages has an answer in it, gold or not.

    `ranked` [Q, >= k] are rows of `texts` [N]. Both sides are normalised as answers are, and whole
    words must match; an answer of which normalisation leaves nothing is never found.
    """
    ranked = _first(ranked, k, len(answers))
    padded: dict[int, str] = {}
    for row in {row for top in ranked for row in top}:
        padded[row] = f" {normalize_answer(texts[row])} "
    scores = np.zeros(len(ranked))
    for i, (top, alternatives) in enumerate(zip(ranked, answers, strict=True)):
        wanted = [f" {a} " for a in map(normalize_answer, alternatives) if a]
        scores[i] = any(answer in padded[row] for row in top for answer in wanted)
    return scores


def _per_question(score: Callable, ranked, golds: Sequence[Collection], k: int) -> np.ndarray:
    ranked = _first(ranked, k, len(golds))
    for i, gold in enumerate(golds):
        if isinstance(gold, str) or not len(gold):
            raise DataError(
                f"question number {i} (from 0) has gold passages {gold!r}; ranking is scored only "
                "over questions with at least one gold id: leave the others out"
            )
    return np.array([score(t, set(g)) for t, g in zip(ranked, golds, strict=True)], np.float64)


def _first(ranked, k: int, questions: int) -> list[list]:
    ranked = np.asarray(ranked)
    if ranked.ndim != 2 or len(ranked) != questions:
        raise ConfigError(
            f"ranked must have one row for each of {questions} questions, has shape {ranked.shape}"
        )
    if not 1 <= k <= ranked.shape[1]:
        raise ConfigError(f"k must be between 1 and the {ranked.shape[1]} passages ranked, got {k}")
    return ranked[:, :k].tolist()
