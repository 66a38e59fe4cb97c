"""How sure a number is, and whether two numbers differ.

`scores` are float [seeds, questions], or [questions] for one seed; the unit goes through unchanged.
Questions are what resampling draws, after averaging over seeds: an interval says what other
questions would have given, `seed_sd` what other seeds would have given.
"""

import numpy as np

from fedrag_jax.errors import ConfigError, DataError

_CHUNK = 1 << 22  # random draws held in memory at once


def bootstrap_interval(
    scores, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean over questions (Efron 1979)."""
    if not 0 < level < 1:
        raise ConfigError(f"level must be between 0 and 1, got {level}")
    per_question = _matrix(scores).mean(axis=0)
    questions = len(per_question)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            per_question[rng.integers(0, questions, (rows, questions), np.int32)].mean(axis=1)
            for rows in _chunks(resamples, questions)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_sd(scores) -> float | None:
    """Standard deviation (n - 1) over seeds of the mean over questions; None for a single seed."""
    means = _matrix(scores).mean(axis=1)
    return float(means.std(ddof=1)) if len(means) > 1 else None


def paired_permutation_test(a, b, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p that a and b, answers to the same questions, have the same mean.

    Flips the sign of each question's seed-averaged difference at random. With few enough questions
    that differ, all sign patterns are tried and p is exact; otherwise it is
    (1 + patterns as extreme) / (1 + resamples), never 0 (Phipson and Smyth 2010).

    Args:
      a, b: [seeds, questions], the same questions in the same order; seeds may differ in number.
    """
    differences = _differences(a, b)
    # A tie adds nothing whatever its sign; EM is mostly ties.
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if 2 ** len(differences) <= resamples:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ differences) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in _chunks(resamples, len(differences)):
        bits = np.unpackbits(
            rng.integers(0, 256, (rows, -(-len(differences) // 8)), np.uint8),
            axis=1, count=len(differences),
        )  # fmt: skip
        # sum of ±d = 2 × (sum of those with +) - (sum of all)
        sums = 2 * (bits.astype(np.float64) @ differences) - differences.sum()
        extreme += int(np.sum(np.abs(sums) >= observed))
    return (1 + extreme) / (1 + resamples)


def paired_t_test(a, b) -> float | None:
    """Two-sided p of a paired t test over the seeds' means.

    None below five seeds, and where all seeds differ by the same, which says nothing of their spread.

    Args:
      a, b: [seeds, questions]; row i of both ran with the same seed, and rows are independent.
    """
    a, b = _matrix(a).mean(axis=1), _matrix(b).mean(axis=1)
    if len(a) != len(b):
        raise ConfigError(f"paired seeds must be equally many, got {len(a)} and {len(b)}")
    if len(a) < 5:
        return None
    differences = a - b
    if np.allclose(differences, differences[0], rtol=1e-9, atol=1e-12):
        return 1.0 if abs(differences[0]) < 1e-12 else None
    from scipy import stats  # here, because it takes a second

    return float(stats.ttest_rel(a, b).pvalue)


def effect_size(a, b) -> float | None:
    """Cohen's d_z of paired answers: the mean difference over the questions' standard deviation of it.

    Lakens 2013 (Front. Psychol. 4:863). Scores are averaged over seeds first. None where all questions
    differ by the same.

    Args:
      a, b: [seeds, questions], the same questions in the same order; seeds may differ in number.
    """
    differences = _differences(a, b)
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return float(differences.mean() / spread) if spread > 1e-12 else None


def better_and_worse(a, b) -> tuple[float, float]:
    """Shares of the questions on which a, averaged over seeds, is above b and below it."""
    differences = _differences(a, b)
    return float(np.mean(differences > 0)), float(np.mean(differences < 0))


def holm(p_values) -> np.ndarray:
    """p values adjusted for being read together (Holm 1979), float64 [n], in the order given.

    Below 0.05 after adjustment, the chance of even one false claim among them is at most 5%.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise DataError(f"p values must be a list of numbers in [0, 1], got {p_values!r}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _differences(a, b) -> np.ndarray:
    """a - b of every question [Q], averaged over seeds; what is only rounding is 0."""
    a, b = _matrix(a).mean(axis=0), _matrix(b).mean(axis=0)
    if len(a) != len(b):
        raise ConfigError(f"paired scores need the same questions, got {len(a)} and {len(b)}")
    differences, scale = a - b, max(np.abs(a).max(), np.abs(b).max())
    return np.where(np.abs(differences) > 1e-12 * scale, differences, 0.0)


def _matrix(scores) -> np.ndarray:
    matrix = np.atleast_2d(np.asarray(scores, np.float64))
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(f"scores must be [seeds, questions] and not empty, got {matrix.shape}")
    if not np.isfinite(matrix).all():
        seed, question = np.argwhere(~np.isfinite(matrix))[0]
        raise DataError(
            f"score of seed {seed}, question {question} is {matrix[seed, question]}; "
            "score every question or leave it out for all seeds"
        )
    return matrix


def _chunks(resamples: int, width: int) -> list[int]:
    """Row counts that add up to resamples, with rows × width of at most _CHUNK."""
    rows = max(1, _CHUNK // width)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
