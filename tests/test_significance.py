"""Intervals that cover as often as they say, tests that err as seldom as they say."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation import significance
from fedrag_jax.evaluation.significance import (
    better_and_worse,
    bootstrap_interval,
    effect_size,
    equivalence_test,
    holm,
    paired_permutation_test,
    paired_t_test,
    seed_sd,
)


def test_bootstrap_agrees_with_scipy():
    scores = np.random.default_rng(0).gamma(1.0, size=(3, 200))[:1]
    reference = stats.bootstrap(
        (scores[0],), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    width = reference.high - reference.low
    assert bootstrap_interval(scores[0]) == pytest.approx(tuple(reference), abs=0.03 * width)
    assert bootstrap_interval(scores[0]) == bootstrap_interval(scores[:1])
    low, high = bootstrap_interval(scores[0], level=0.5)
    assert 0.3 < (high - low) / width < 0.4  # a normal's 50% interval is 0.344 of its 95%


def test_bootstrap_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(rng.random(100) < 0.4, resamples=500, seed=trial)
        hits += low <= 0.4 <= high
    assert 0.91 < hits / 400 < 0.98


def slow_bootstrap(scores, clusters, resamples, seed=0):
    """Seeds and clusters drawn one by one, and the mean of all answers that were drawn."""
    rng, means = np.random.default_rng(seed), []
    names = sorted(set(clusters))
    for _ in range(resamples):
        seeds = rng.choice(len(scores), len(scores))
        drawn = rng.choice(names, len(names))
        values = [scores[s][q] for s in seeds for c in drawn for q in np.flatnonzero(clusters == c)]
        means.append(np.mean(values))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_agrees_with_a_slow_one_over_seeds_and_clusters():
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 12, 60))
    scores = rng.random((4, 60)) + rng.normal(size=12)[clusters] + rng.normal(size=(4, 1))
    low, high = slow_bootstrap(scores, clusters, 4000)
    found = bootstrap_interval(scores, clusters)
    assert found == pytest.approx((low, high), abs=0.04 * (high - low))
    # What either level alone would say is narrower.
    assert high - low > 1.2 * np.diff(bootstrap_interval(scores.mean(0), clusters))[0]
    assert high - low > 1.05 * np.diff(bootstrap_interval(scores))[0]


def test_seeds_and_questions_are_drawn_apart():
    """As many of each, and a score only where both have the same number."""
    means = significance._resampled_means(np.eye(5), np.arange(5), None, 4000, 0)
    assert means.mean() == pytest.approx(0.2, abs=0.02)


def test_bootstrap_resamples_seeds_too():
    same_questions = np.tile(np.array([[0.0], [1.0]]), (1, 50))  # seeds differ, questions do not
    assert bootstrap_interval(same_questions) == (0.0, 1.0)
    assert bootstrap_interval(same_questions.mean(0)) == (0.5, 0.5)


def test_two_level_intervals_cover_the_truth_where_articles_and_seeds_vary():
    rng, hits, naive = np.random.default_rng(1), 0, 0
    clusters = np.repeat(np.arange(30), 10)
    for trial in range(400):
        article, seed = rng.normal(size=30)[clusters], 0.2 * rng.normal(size=(8, 1))
        scores = article + seed + rng.normal(size=(8, 300))
        low, high = bootstrap_interval(scores, clusters, resamples=400, seed=trial)
        hits += low <= 0 <= high
        low, high = bootstrap_interval(scores.mean(0), resamples=400, seed=trial)
        naive += low <= 0 <= high
    assert 0.92 < hits / 400 <= 0.98
    assert naive / 400 < 0.6  # questions alone, as if of as many articles


def test_weighted_intervals_stay_within_what_can_be():
    """Questions that count more for some seeds: a mean of scores in [0, 1] is in [0, 1]."""
    rng = np.random.default_rng(0)
    clusters, weights = np.repeat(np.arange(20), 3), rng.gamma(0.3, size=(4, 60))
    scores = (rng.random((4, 60)) < 0.97).astype(float)
    low, high = bootstrap_interval(scores, clusters, weights)
    assert low < np.average(scores, axis=1, weights=weights).mean() < high <= 1
    assert bootstrap_interval(scores, clusters, np.full((4, 60), 2.5)) == pytest.approx(
        bootstrap_interval(scores, clusters)
    )
    assert bootstrap_interval(np.ones((4, 60)), clusters, weights) == pytest.approx((1, 1))
    assert seed_sd([[0, 1], [1, 1]], [[1, 3], [1, 1]]) == pytest.approx(np.std([0.75, 1], ddof=1))


def test_clusters_that_are_not_one_a_question_are_refused():
    with pytest.raises(DataError, match=r"clusters must be \[3\], one a question, got \(2,\)"):
        bootstrap_interval([1.0, 2, 3], [0, 0])


def test_permutations_by_cluster_flip_articles():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(8), 5)
    a, b = rng.random((2, 40)), rng.random((2, 40))
    d = (a.mean(0) - b.mean(0)).reshape(8, 5).sum(1)
    extreme = [
        abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12
        for signs in itertools.product((1, -1), repeat=8)
    ]
    assert paired_permutation_test(a, b, clusters) == np.mean(extreme)


def test_false_positives_by_article_are_five_in_a_hundred():
    rng, by_article, by_question = np.random.default_rng(2), [], []
    clusters = np.repeat(np.arange(20), 10)
    for trial in range(1000):
        differences = rng.normal(size=20)[clusters] + rng.normal(size=200)
        zero = np.zeros(200)
        by_article.append(
            paired_permutation_test(differences, zero, clusters, resamples=200, seed=trial)
        )
        by_question.append(paired_permutation_test(differences, zero, resamples=200, seed=trial))
    assert 0.03 < np.mean(np.array(by_article) <= 0.05) < 0.07
    assert np.mean(np.array(by_question) <= 0.05) > 0.3


def test_equivalence_is_where_the_90_percent_interval_lies_within_the_margin():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(50), 4)
    a, b = rng.random((5, 200)), rng.random((5, 200))
    low, high = bootstrap_interval(a - b, clusters, level=0.9)
    edge = max(-low, high)
    assert equivalence_test(a, b, 1.05 * edge, clusters) < 0.05
    assert equivalence_test(a, b, 0.95 * edge, clusters) > 0.05
    assert equivalence_test(a, b, 1e-9, clusters) > 0.4
    # One mean on the margin: claimed in one of twenty tables.
    claims = []
    for trial in range(1000):
        at_edge = 0.1 + 0.3 * rng.normal(size=200)
        p = equivalence_test(at_edge, np.zeros(200), 0.1, resamples=400, seed=trial)
        claims.append(p < 0.05)
    assert 0.03 < np.mean(claims) < 0.075
    for margin in (0, -1, np.nan):
        with pytest.raises(ConfigError, match="margin must be > 0"):
            equivalence_test(a, b, margin)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_that_differ_are_not_called_equivalent_by_chance(seeds):
    """Where seeds differ more than questions, a bootstrap of three claims it in one of six tables."""
    rng, claims = np.random.default_rng(0), []
    for trial in range(400):
        at_edge = 4 + rng.normal(0, 2, (seeds, 1)) + rng.normal(0, 4, 60)
        p = equivalence_test(at_edge, np.zeros((seeds, 60)), 4.0, resamples=200, seed=trial)
        claims.append(p < 0.05)
    assert np.mean(claims) < 0.075


def test_equivalence_over_seeds_by_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (4, 1)) + np.zeros(50), np.zeros((4, 50))
    sides = [
        stats.ttest_1samp(a[:, 0], edge, alternative=way).pvalue
        for edge, way in ((2.0, "less"), (-2.0, "greater"))
    ]
    assert equivalence_test(a, b, 2.0) == pytest.approx(max(sides))


def test_bootstrap_in_pieces_draws_as_many_as_asked(monkeypatch):
    scores = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(scores, resamples=1001)
    monkeypatch.setattr(significance, "_CHUNK", 500)
    assert sum(significance._chunks(1001, 50)) == 1001
    assert bootstrap_interval(scores, resamples=1001) == pytest.approx(whole, abs=0.01)


def test_seed_sd():
    assert seed_sd([[1, 1], [2, 2], [3, 3]]) == 1.0
    assert seed_sd([[1, 2, 3]]) is None
    assert seed_sd([1, 2, 3]) is None


def test_permutation_test_is_exact_for_few_questions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9)), rng.normal(size=(2, 9)) + 0.5
    d = a.mean(axis=0) - b.mean(axis=0)
    extreme = [
        abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12
        for signs in itertools.product((1, -1), repeat=9)
    ]
    assert paired_permutation_test(a, b) == np.mean(extreme)
    sampled = paired_permutation_test(a, b, resamples=500)
    assert sampled == pytest.approx(np.mean(extreme), abs=0.06)
    # Five differences of one sign: 2 of 32 patterns are as extreme. Ties change nothing.
    assert paired_permutation_test([1] * 5 + [7] * 90, [0] * 5 + [7] * 90) == 2 / 32


def test_permutation_test_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.random(300), rng.random(300) + 0.06
    reference = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=20_000, rng=1,
    ).pvalue  # fmt: skip
    assert 0.01 < reference < 0.3
    assert paired_permutation_test(a, b) == pytest.approx(reference, abs=0.02)
    assert paired_permutation_test(b, a) == pytest.approx(reference, abs=0.02)


def test_permutation_test_extremes():
    a = np.random.default_rng(0).random(500)
    assert paired_permutation_test(a, a) == 1.0
    assert paired_permutation_test([a, a + 0.1], [a + 0.1, a]) == 1.0  # equal once averaged
    assert paired_permutation_test(a + 1, a, resamples=999) == 1 / 1000  # never 0


def nothing_differs(rng, seeds=5, questions=60):
    """Answers of two systems that are equally good, to questions of which some are harder."""
    hard = rng.random(questions)
    return rng.random((seeds, questions)) < hard, rng.random((seeds, questions)) < hard


def test_false_positives_of_the_permutation_test_are_five_in_a_hundred():
    rng = np.random.default_rng(0)
    p = []
    for trial in range(5000):
        hard = rng.random(60)
        a, b = hard + rng.random((5, 60)), hard + rng.random((5, 60))  # no ties, as in F1
        p.append(paired_permutation_test(a, b, resamples=400, seed=trial))
    assert 0.04 < np.mean(np.array(p) <= 0.05) < 0.06
    assert 0.46 < np.mean(np.array(p) <= 0.5) < 0.54


@pytest.mark.parametrize("seeds, questions", [(1, 20), (5, 60)])
def test_false_positives_of_a_discrete_permutation_test_are_six_in_a_hundred_at_most(
    seeds, questions
):
    rng = np.random.default_rng(1)
    p = [
        paired_permutation_test(*nothing_differs(rng, seeds, questions), resamples=400, seed=trial)
        for trial in range(5000)
    ]
    assert 0.005 < np.mean(np.array(p) <= 0.05) < 0.06


def test_false_positives_of_the_t_test_are_five_in_a_hundred():
    rng = np.random.default_rng(2)
    p = [paired_t_test(*nothing_differs(rng)) for _ in range(5000)]
    assert 0.04 < np.mean(np.array(p) <= 0.05) < 0.06


def test_false_positives_of_the_interval_of_a_difference_are_five_in_a_hundred():
    rng = np.random.default_rng(3)
    misses = 0
    for trial in range(5000):
        a, b = nothing_differs(rng, questions=200)
        low, high = bootstrap_interval(a.mean(0) - b.mean(0), resamples=400, seed=trial)
        misses += not low <= 0 <= high
    assert 0.04 < misses / 5000 < 0.06


def test_false_claims_of_a_whole_table_are_five_in_a_hundred_at_most():
    rng = np.random.default_rng(4)
    tables = [
        [paired_t_test(*nothing_differs(rng, questions=30)) for _ in range(6)] for _ in range(1000)
    ]
    claims = [(holm(p) <= 0.05).any() for p in tables]
    assert np.mean(claims) < 0.065  # 0.05, with two standard errors
    assert np.mean([(np.array(p) <= 0.05).any() for p in tables]) > 0.2  # unadjusted: 1 - 0.95^6


def test_effect_size_by_hand():
    a, b = np.array([[1.0, 1, 0, 1]]), np.array([[0.0, 1, 0, 0]])
    # Differences 1 0 0 1: mean 1/2, standard deviation sqrt(1/3).
    assert effect_size(a, b) == pytest.approx(0.5 / np.sqrt(1 / 3))
    assert effect_size(b, a) == -effect_size(a, b)
    assert effect_size([a[0], b[0]], [b[0], a[0]]) is None  # equal once averaged
    assert effect_size(a + 1, a) is None
    rng = np.random.default_rng(0)
    assert effect_size(rng.normal(0.3, 1, 20_000), np.zeros(20_000)) == pytest.approx(0.3, abs=0.03)


def test_better_and_worse():
    assert better_and_worse([1, 1, 0, 1], [0, 1, 1, 0]) == (0.5, 0.25)
    assert better_and_worse([[0.1, 1], [0.2, 1]], [[0.15, 0], [0.15, 1]]) == (0.5, 0.0)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 1000)) < 0.50, rng.random((5, 1000)) < 0.45
    assert paired_permutation_test(a, b) < 0.01
    assert paired_t_test(a, b) < 0.05


def test_paired_t_test_by_hand():
    a = np.array([1.0, 2, 3, 4, 5])[:, None]
    b = a - np.array([1.0, 2, 3, 4, 5])[:, None]
    # Differences 1..5: mean 3, sd sqrt(2.5), t = 3 / sqrt(2.5 / 5) = 4.243 with 4 degrees: 0.0132.
    assert paired_t_test(a, b) == pytest.approx(0.013236, abs=1e-5)
    assert paired_t_test(a[:4], b[:4]) is None
    assert paired_t_test(a, a) == 1.0
    assert paired_t_test(a + 0.5, a) is None  # no spread to judge it by


def test_holm():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and none below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert holm([]).shape == (0,)


def test_holm_agrees_with_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is absent")
    p = np.random.default_rng(0).random(20) ** 3
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


def test_scores_that_are_none_are_refused():
    for broken in ([[0.5, np.nan]], [[0.5, np.inf]]):
        with pytest.raises(DataError, match="seed 0, question 1"):
            bootstrap_interval(broken)
    with pytest.raises(DataError, match="not empty"):
        seed_sd([[]])
    with pytest.raises(ConfigError, match="same questions, got 2 and 3"):
        paired_permutation_test([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match="equally many, got 5 and 6"):
        paired_t_test(np.ones((5, 2)), np.ones((6, 2)))
    with pytest.raises(DataError, match=r"in seed number 1 .* so few clusters have weight"):
        bootstrap_interval([[1, 2, 3], [4, 5, 6]], weights=[[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ConfigError, match="level must be"):
        bootstrap_interval([1, 2], level=95)
    for broken in ([0.1, np.nan], [1.2], [[0.1]]):
        with pytest.raises(DataError, match="p values"):
            holm(broken)
