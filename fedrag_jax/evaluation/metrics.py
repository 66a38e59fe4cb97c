"""Scores of answers, one per question.

Every function over many questions returns float64 [Q] with values in [0, 1], ready for
`significance.bootstrap_interval`; tables print `percent` of it. Those of rankings are in `rankings`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.answers import (
    comparable,
    normalize_answer,
    normalize_chinese,
    normalize_japanese,
    normalize_trivia,
    stands_in,
)
from fedrag_jax.data.citations import UNKNOWN
from fedrag_jax.errors import ConfigError, DataError, missing

# Ways to say that nothing is known: this project's own, SQuAD v2's and HotpotQA's, and plain words.
ABSTENTIONS = (UNKNOWN, "unanswerable", "noanswer", "no answer", "I don't know", "I do not know")


def percent(scores: np.ndarray) -> float:
    """Returns 100 × the mean over all questions (and seeds, if there is an axis for them)."""
    scores = np.asarray(scores, np.float64)
    if not scores.size:
        raise DataError("no question was scored: an average over nothing has no value")
    return float(100 * scores.mean())


YES_NO = ("yes", "no", "noanswer")


def exact_match(prediction: str, answers: Sequence[str], rule: str = "squad") -> float:
    """Returns 1.0 if the prediction is one of the answers after normalisation, else 0.0.

    Args:
      rule: as in `f1`.
    """
    return _best(lambda p, a: float(p == a), prediction, answers, rule)


def f1(prediction: str, answers: Sequence[str], rule: str = "squad") -> float:
    """Returns the F1 of the bags of normalised words, best over the answers, in [0, 1].

    Args:
      rule: "squad" as in evaluate-v1.1.py; "squad_v2" as in evaluate-v2.0.py, where a question may have
        no answer and an empty prediction is then correct; "hotpotqa" as in hotpot_evaluate_v1.py, where
        yes, no and noanswer match only themselves; "triviaqa" as in triviaqa_evaluation.py, where
        punctuation separates words; "zh" as in mlqa_evaluation_v1.py for Chinese, by
        character; "ja" the same for Japanese, including kana.

    Raises:
      ConfigError: an unknown rule.
      DataError: no answers, except in SQuAD v2.
    """
    return _best(None, prediction, answers, rule)


def substring_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the prediction contains an answer after normalisation: sub-EM, or accuracy.

    It grows with the length of predictions, so report it together with exact match. An answer that
    normalisation makes empty, such as "A", is matched literally.
    """
    _require_answers(answers)
    said = normalize_answer(prediction)
    return float(
        any(
            wanted in said if (wanted := normalize_answer(a)) else a and stands_in(a, prediction)
            for a in answers
        )
    )


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Returns the F-measure of the longest common subsequence of words, best over the answers (Lin,
    2004).

    Uses the package rouge-score without stemming: lower case, only words of Latin letters and digits.

    Raises:
      ConfigError: the package is missing.
    """
    _require_answers(answers)
    scorer = _rouge()
    return max(scorer.score(answer, prediction)["rougeL"].fmeasure for answer in answers)


def score_answers(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], rule: str = "squad"
) -> dict[str, np.ndarray]:
    """Returns {"em": [Q], "f1": [Q]} for one prediction per question against all of its answers.

    Args:
      rule: as in `f1`.
    """
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "em": np.array([exact_match(p, a, rule) for p, a in pairs], np.float64),
        "f1": np.array([f1(p, a, rule) for p, a in pairs], np.float64),
    }


def abstained(predictions: Sequence[str], abstentions: Sequence[str] = ABSTENTIONS) -> np.ndarray:
    """Returns [Q]: 1 if a prediction is blank or one of the abstentions.

    "A" is an answer, although its normal form is empty.
    """
    said = {comparable(text) for text in ("", *abstentions)}
    return np.array([float(comparable(p) in said) for p in predictions])


def _squad_f1(prediction: str, answer: str) -> float:
    predicted, wanted = prediction.split(), answer.split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _squad_v2_f1(prediction: str, answer: str) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    return _squad_f1(prediction, answer)


def _hotpotqa_f1(prediction: str, answer: str) -> float:
    if prediction != answer and (prediction in YES_NO or answer in YES_NO):
        return 0.0
    return _squad_f1(prediction, answer)


class Rule(NamedTuple):
    """A rule for comparing answers: the normal form, and F1 of two answers."""

    normal: Callable[[str], str]
    f1: Callable[[str, str], float]


RULES = {
    "squad": Rule(normalize_answer, _squad_f1),
    "squad_v2": Rule(normalize_answer, _squad_v2_f1),
    "hotpotqa": Rule(normalize_answer, _hotpotqa_f1),
    "triviaqa": Rule(normalize_trivia, _squad_f1),
    "zh": Rule(normalize_chinese, _squad_f1),
    "ja": Rule(normalize_japanese, _squad_f1),
}


def require_rule(rule: str) -> Rule:
    """Returns the rule with a name.

    Raises:
      ConfigError: an unknown name.
    """
    if rule not in RULES:
        raise ConfigError(f"the rule must be one of {[*RULES]}, got {rule!r}")
    return RULES[rule]


def _best(
    score: Callable[[str, str], float] | None, prediction: str, answers: Sequence[str], rule: str
) -> float:
    """Returns the best score over the answers; default: the rule's F1."""
    normal, f1_of = require_rule(rule)
    if rule != "squad_v2" or isinstance(answers, str):
        _require_answers(answers)
    golds = [normal(answer) for answer in answers]
    if rule == "squad_v2":
        golds = [gold for gold in golds if gold] or [""]
    prediction = normal(prediction)
    return max((score or f1_of)(prediction, gold) for gold in golds)


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise DataError(f"answers must be a list of at least one string, got {answers!r}")


@functools.cache
def _rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing("ROUGE-L needs rouge-score", "rouge") from error
    return RougeScorer(["rougeL"])
