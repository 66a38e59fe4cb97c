"""Confidence intervals and significance tests.

`scores` are float [seeds, questions], or [questions] for one seed; results have the same unit.
`clusters` are int [questions]: questions of one cluster (about one article, or one gold passage) are
not independent and are resampled together. By default every question is a cluster of its own.
`weights` are float [seeds, questions], the weight of a question in the mean; by default all are equal.

An interval covers other seeds and other questions: both are resampled. A permutation test over
questions holds only for the trained models; `paired_t_test` over seeds holds for the method.
"""

import functools

import numpy as np

from fedrag_jax.errors import ConfigError, DataError

_CHUNK = 1 << 22  # random draws held in memory at once


def bootstrap_interval(
    scores,
    clusters=None,
    weights=None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Two-level percentile bootstrap interval (low, high) of the mean.

    Each resample draws as many seeds and as many clusters of questions as there are, with replacement:
    the pigeonhole bootstrap (Owen 2007, doi:10.1214/07-AOAS122). It is conservative (too wide) if
    scores vary by question, or by seed and question at once, more than by seed, and too narrow if a few
    seeds differ much (`experiments.benchmarks.interval_coverage`). For paired scores, pass the
    differences.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must be between 0 and 1, got {level}")
    means = _resampled_means(scores, clusters, weights, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def equivalence_test(
    a, b, margin: float, clusters=None, weights=None, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Returns p of two one-sided tests that the means of a and b differ by less than `margin`
    (Schuirmann 1987).

    Each side uses the two-level bootstrap of the paired differences, so that p < 0.05 only if the 90%
    interval is between -margin and margin. p is never 0: (1 + resamples beyond) / (1 + resamples). With
    two seeds or more, each side is also tested by t over the seeds' differences, and the larger p
    counts: resampling a few seeds understates how much seeds differ.

    Args:
      a, b: [seeds, questions]; row i of both ran with the same seed.
      margin: > 0, in the unit of the scores; choose it before the scores are known.

    Raises:
      ConfigError: a margin that is not positive, or different shapes.
    """
    if not margin > 0:
        raise ConfigError(f"an equivalence margin must be > 0, got {margin}")
    a, b = _matrix(a), _matrix(b)
    if a.shape != b.shape:
        raise ConfigError(f"paired scores need one shape, got {a.shape} and {b.shape}")
    means = _resampled_means(a - b, clusters, weights, resamples, seed)
    beyond = max(np.sum(means >= margin), np.sum(means <= -margin))
    return max(float((1 + beyond) / (1 + resamples)), _over_seeds(a - b, margin, weights))


def _over_seeds(differences, margin: float, weights) -> float:
    """Returns p of the two one-sided t tests over seeds; 0 for a single seed or equal ones."""
    means = seed_means(differences, weights)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else 0.0
    if not error:
        return 0.0
    from scipy import stats  # here, because it takes a second

    return float(stats.t.sf((margin - abs(means.mean())) / error, len(means) - 1))


def _resampled_means(scores, clusters, weights, resamples: int, seed: int) -> np.ndarray:
    """Returns means [resamples] over seeds and clusters drawn with replacement."""
    scores = _matrix(scores)
    weights = np.ones_like(scores) if weights is None else _matrix(weights)
    sums, sizes = _by_cluster(weights * scores, clusters), _by_cluster(weights, clusters)
    seeds, count = sums.shape
    drawn, times = _drawn(count, resamples, seed), _drawn(seeds, resamples, seed + 1) / seeds
    means, start = [], 0
    for rows in _chunks(resamples, count):
        some = drawn[start : start + rows].astype(np.float64)
        total = some @ sizes.T
        if (bare := (total == 0).any(0)).any():
            raise DataError(
                f"weights: in seed number {bare.argmax()} (from 0) so few clusters have weight that a "
                "resample drew none; leave the seed out, or weight more of its questions"
            )
        means.append((times[start : start + rows] * (some @ sums.T) / total).sum(1))
        start += rows
    return np.concatenate(means)


@functools.lru_cache(maxsize=8)  # a table asks for the same draws many times
def _drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, count]: how often each of `count` things is drawn in `count` draws."""
    rng = np.random.default_rng(seed)
    found = []
    for rows in _chunks(resamples, count):
        places = rng.integers(0, count, (rows, count), np.int64)
        places += np.arange(rows)[:, None] * count
        times = np.bincount(places.ravel(), minlength=rows * count)
        found.append(times.reshape(rows, count).astype(np.uint16))
    return np.concatenate(found)


def _by_cluster(scores: np.ndarray, clusters) -> np.ndarray:
    """Sums [seeds, clusters] of scores."""
    questions = scores.shape[1]
    if clusters is None:
        return scores
    clusters = np.asarray(clusters)
    if clusters.shape != (questions,):
        raise DataError(f"clusters must be [{questions}], one a question, got {clusters.shape}")
    names, place = np.unique(clusters, return_inverse=True)
    return np.stack([np.bincount(place, row, len(names)) for row in scores])


def seed_sd(scores, weights=None) -> float | None:
    """Standard deviation (n - 1) over seeds of the mean over questions; None for a single seed."""
    means = seed_means(scores, weights)
    return float(means.std(ddof=1)) if len(means) > 1 else None


def seed_means(scores, weights=None) -> np.ndarray:
    """Means [seeds] over questions."""
    return np.average(
        _matrix(scores), axis=1, weights=None if weights is None else _matrix(weights)
    )


def paired_permutation_test(
    a, b, clusters=None, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Returns the two-sided p of the hypothesis that a and b have the same mean on the same questions.

    The test flips the sign of each cluster's seed-averaged difference at random. If few clusters
    differ, all sign patterns are tried and p is exact; otherwise it is
    (1 + patterns as extreme) / (1 + resamples), never 0 (Phipson and Smyth 2010).

    Args:
      a, b: [seeds, questions], the same questions in the same order; seeds may differ in number.
    """
    sums = _by_cluster(_differences(a, b)[None], clusters)
    # A tie adds nothing whatever its sign; EM is mostly ties.
    differences = sums[0][np.abs(sums[0]) > 1e-12 * np.abs(sums).max()]
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
    """Returns the two-sided p of a paired t test over the seeds' means.

    It is None with fewer than five seeds, or if the difference is the same for all seeds.

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
    """Returns Cohen's d_z: the mean difference divided by its standard deviation over questions.

    Lakens 2013 (Front. Psychol. 4:863). Scores are averaged over seeds first. None if the difference is
    the same for all questions.

    Args:
      a, b: [seeds, questions], the same questions in the same order; seeds may differ in number.
    """
    differences = _differences(a, b)
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return float(differences.mean() / spread) if spread > 1e-12 else None


def better_and_worse(a, b) -> tuple[float, float]:
    """Returns the shares of questions on which a, averaged over seeds, is above b and below b."""
    differences = _differences(a, b)
    return float(np.mean(differences > 0)), float(np.mean(differences < 0))


def holm(p_values) -> np.ndarray:
    """Returns p values adjusted for multiple tests (Holm 1979), float64 [n], in the given order.

    If values below 0.05 after adjustment are claimed, the chance of any false claim is at most 5%.
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
    """Returns a - b of every question [Q], averaged over seeds; rounding errors are set to 0."""
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
