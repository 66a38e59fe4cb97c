"""How well scores separate members from non-members: pure functions of two lists of scores.

A higher score says "member". An AUC of 0.5 is guessing. The true positive rate at a false positive rate
of 1% is the share of members that an attacker identifies with confidence (Carlini et al. 2022, arXiv
2112.03570, section III).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.errors import DataError

Statistic = Callable[[np.ndarray, np.ndarray], float]


class Attack(NamedTuple):
    """An attack on one model.

    Attributes:
      scores: float [N]; higher means that the attack takes the item for a member.
      member: bool [N], whether the item is a member.
      group: int [N], the group of each item; items of a group, such as the questions of a client, are
        resampled together.
    """

    scores: np.ndarray
    member: np.ndarray
    group: np.ndarray


def auc(members, others) -> float:
    """Returns the probability that a member's score is above a non-member's; ties count half.

    Raises:
      DataError: no members or no others, or a score that is NaN.
    """
    members, others = _numbers(members, others)
    others = np.sort(others)
    below, up_to = (np.searchsorted(others, members, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(others)))


def tpr_at_fpr(members, others, fpr: float = 0.01) -> float:
    """Returns the share of members above the threshold that at most a share `fpr` of the others exceed.

    If there are fewer than 1 / fpr others, none of them may exceed it.

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
    same_questions: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Returns `(mean over the models, low, high)` by a bootstrap over models and groups in a model.

    Groups of members and groups of others are resampled separately, so that both are always present. A
    group with members and others counts as two groups.

    Args:
      same_questions: whether all models are asked the same, in the same order. Their groups are then
        resampled together, because what varies with the questions does not average out over models.

    Raises:
      DataError: as `auc`.
    """
    rng = np.random.default_rng(seed)
    value = np.mean([statistic(a.scores[a.member], a.scores[~a.member]) for a in attacks])
    draws = [np.random.default_rng([seed, 1]) if same_questions else rng for _ in attacks]
    drawn = [
        _resampled(statistic, attack, resamples, draw)
        for attack, draw in zip(attacks, draws, strict=True)
    ]
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
            raise DataError(
                f"an attack needs scores of members and of others, but there are no {name}"
            )
        if np.isnan(scores).any():
            raise DataError(f"score {int(np.argmax(np.isnan(scores)))} of the {name} is NaN")
    return found
