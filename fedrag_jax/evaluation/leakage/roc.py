"""How well a score tells members from others: pure functions of two lists of scores.

Higher scores say "member". An AUC of 0.5 is guessing; the true positives at 1% false ones say how many
members an attacker is sure of (Carlini et al. 2022, arXiv 2112.03570, section III).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.errors import DataError

Statistic = Callable[[np.ndarray, np.ndarray], float]


class Attack(NamedTuple):
    """An attack on one model.

    Attributes:
      scores: float [N], higher for what it takes for a member.
      member: bool [N].
      group: int [N], of what is drawn together, such as the questions of one client.
    """

    scores: np.ndarray
    member: np.ndarray
    group: np.ndarray


def auc(members, others) -> float:
    """The probability that a member's score is above another's, ties counting half.

    Raises:
      DataError: none of one kind, or a score that is not a number.
    """
    members, others = _numbers(members, others)
    others = np.sort(others)
    below, up_to = (np.searchsorted(others, members, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(others)))


def tpr_at_fpr(members, others, fpr: float = 0.01) -> float:
    """The share of members above a threshold that at most `fpr` of the others are above.

    Of fewer than 1 / fpr others none may be.

    Raises:
      DataError: as `auc`, and an `fpr` outside of [0, 1).
    """
    members, others = _numbers(members, others)
    if not 0 <= fpr < 1:
        raise DataError(f"a false positive rate must be in [0, 1), got {fpr}")
    threshold = np.sort(others)[::-1][int(fpr * len(others) + 1e-9)]
    return float(np.mean(members > threshold))


def estimate(
    statistic: Statistic,
    attacks: Sequence[Attack],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`(mean over the models, low, high)`, by a bootstrap over models and over groups within each.

    Groups of members and of others are drawn by themselves, so that there are always some of both. A
    group that has members and others is two.

    Raises:
      DataError: as `auc`.
    """
    rng = np.random.default_rng(seed)
    value = np.mean([statistic(a.scores[a.member], a.scores[~a.member]) for a in attacks])
    drawn = [_resampled(statistic, attack, resamples, rng) for attack in attacks]
    which = rng.integers(0, len(attacks), (len(attacks), resamples))
    means = np.take_along_axis(np.array(drawn), which, axis=0).mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(value), float(low), float(high)


def _resampled(statistic: Statistic, attack: Attack, resamples: int, rng) -> list[float]:
    kinds = []
    for kind in (attack.member, ~attack.member):
        names, place = np.unique(attack.group[kind], return_inverse=True)
        kinds.append((attack.scores[kind], len(names), place))
    found = []
    for _ in range(resamples):
        both = []
        for scores, count, place in kinds:
            times = np.bincount(rng.integers(0, count, count), minlength=count)
            both.append(np.repeat(scores, times[place]))
        found.append(statistic(*both))
    return found


def _numbers(members, others) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(members, np.float64), np.asarray(others, np.float64)
    for name, scores in zip(("members", "others"), found, strict=True):
        if not scores.size:
            raise DataError(f"an attack needs scores of members and of others; there are no {name}")
        if np.isnan(scores).any():
            raise DataError(f"score {int(np.argmax(np.isnan(scores)))} of the {name} is no number")
    return found
