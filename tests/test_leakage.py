"""What attacks are made of, against slow NumPy; that they succeed is in test_planted_leaks.py."""

import numpy as np
import pytest
from scipy import stats
from toy_rag import EXAMPLES, PASSAGES, toy_parts

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import DataError
from fedrag_jax.evaluation.leakage import extraction, membership, users
from fedrag_jax.evaluation.leakage.inversion import placed, r_precision, touched
from fedrag_jax.evaluation.leakage.roc import Attack, auc, estimate, tpr_at_fpr
from fedrag_jax.evaluation.leakage.signals import ranking_nll

RNG = np.random.default_rng(3)
# With ties, and on one side more.
MEMBERS, OTHERS = RNG.integers(0, 30, 70) + 4.0, RNG.integers(0, 30, 150) + 0.0


def test_auc_is_the_share_of_pairs_in_order():
    pairs = [(m > o) + 0.5 * (m == o) for m in MEMBERS for o in OTHERS]
    assert auc(MEMBERS, OTHERS) == pytest.approx(np.mean(pairs))
    assert auc(MEMBERS, MEMBERS) == 0.5 and auc([2], [1]) == 1 and auc([1], [2]) == 0


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.02, 0.1, 0.5])
def test_tpr_is_that_of_the_best_threshold_there_is(fpr):
    thresholds = [*np.concatenate([MEMBERS, OTHERS]), -np.inf]
    allowed = [t for t in thresholds if np.mean(t < OTHERS) <= fpr]
    assert tpr_at_fpr(MEMBERS, OTHERS, fpr) == max(np.mean(t < MEMBERS) for t in allowed)


def test_an_interval_covers_what_it_estimates():
    """Normal scores one deviation apart, whose AUC is Φ(1/√2), in groups of five that move together."""
    truth, inside = stats.norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        member, group = np.arange(200) < 100, np.arange(200) // 5
        scores = member + 0.8 * rng.normal(size=40)[group] + 0.6 * rng.normal(size=200)
        value, low, high = estimate(auc, [Attack(scores, member, group)], resamples=200, seed=seed)
        assert low <= value <= high
        inside += low <= truth <= high
    assert inside >= 33  # 95% of 40 are 38; one in two thousand has fewer than 33


def test_the_ranking_loss_in_numpy():
    retriever = toy_parts().retriever
    expected = []
    for example in EXAMPLES:
        (query,) = retriever.embed_questions([example.question])
        gold = [p.id for p in PASSAGES].index(example.positive_ids[0])
        terms = [np.exp(7.0 * float(query @ vector)) for vector in retriever.vectors]
        expected.append(-np.log(terms[gold] / sum(terms)))
    found = ranking_nll(retriever, EXAMPLES, score_scale=7.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_several_models_are_averaged():
    kinds = np.arange(6) < 3, np.arange(6)
    sure, blind = np.array([3.0, 3, 3, 0, 0, 0]), np.zeros(6)
    found = estimate(auc, [Attack(sure, *kinds), Attack(blind, *kinds)], resamples=300)
    assert found == (0.75, 0.5, 1.0)


def test_likelihood_ratio_in_numpy():
    nll, shadows = RNG.gamma(2, size=9), RNG.gamma(2, size=(6, 9))
    trained = membership.halves(9, 6, seed=1)
    found = membership.likelihood_ratio(nll, shadows, trained)
    out = [[p for p, t in zip(s, on, strict=True) if not t] for s, on in zip(shadows.T, trained.T,
                                                                             strict=True)]  # fmt: skip
    phi = [np.log(np.exp(-np.array(x)) / (1 - np.exp(-np.array(x)))) for x in out]
    spread = np.sqrt(np.mean([x.var(ddof=1) for x in phi]))  # three of each
    expected = [
        (np.log(np.exp(-n) / (1 - np.exp(-n))) - x.mean()) / spread
        for n, x in zip(nll, phi, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_confidence_is_finite_where_a_model_is_sure():
    assert np.isfinite(membership.confidence([0.0, 1e-9, 1e-3, 50.0, 800.0])).all()


def test_halves_hold_everything_as_often():
    found = membership.halves(11, 8, seed=4)
    assert (found.sum(0) == 4).all() and {*found.sum(1)} == {5, 6}
    assert len({row.tobytes() for row in found}) == 8


def test_users_are_judged_by_their_means():
    names, scores = users.took_part([1.0, 4.0, 2.0, 0.0], [7, 3, 7, 3])
    assert names.tolist() == [3, 7] and scores.tolist() == [2.0, 1.5]
    assert users.source([[1.0, 2.0], [3.0, 0.5]]).tolist() == [0, 1]


def test_runs_of_words_are_found():
    passages = [
        Passage("a", "", "Ann was born in Rome in 1700."),
        Passage("b", "", "Bob was here."),
    ]
    texts = ["She said: ann was BORN in Rome, I think.", "Bob was"]
    assert extraction.said(texts, passages, 4).tolist() == [True, False]
    assert extraction.said(texts, passages, 2).tolist() == [True, True]
    assert extraction.said(texts, passages, 5).tolist() == [False, False]  # "Rome," is not "Rome"
    assert extraction.prompts(["x"], ("", "Say it.")) == ["x", "x Say it."]


def test_what_was_read_lies_in_the_span_of_a_gradient():
    inputs, read = RNG.normal(size=(3, 40, 16)), [(0, 4), (1, 9), (1, 11), (2, 30)]
    x = np.array([inputs[place, token] for place, token in read])
    outside = placed(x.T @ RNG.normal(size=(4, 16)), inputs)
    told = {(int(p), int(t)) for p, t in np.argwhere(outside < 1e-6)}
    assert told == {*read}
    # Slowly, of one input: what least squares leaves.
    rest = inputs[0, 0] - x.T @ np.linalg.lstsq(x.T, inputs[0, 0], rcond=None)[0]
    assert outside[0, 0] == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(inputs[0, 0]))


def test_precision_counts_ties_against_the_attacker():
    assert r_precision([3.0, 2, 2, 0], [True, True, False, False]) == 0.5
    assert r_precision(np.zeros(4), np.arange(4) < 2) == 0.0
    np.testing.assert_allclose(touched(np.array([[3.0, 4.0], [0.0, 0.0]])), [5, 0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: auc([], [1.0]), "there are no members"),
        (lambda: auc([1.0], [0.0, np.nan]), "score 1 of the others is NaN"),
        (lambda: tpr_at_fpr([1.0], [0.0], 1.0), r"must be in \[0, 1\), got 1.0"),
        (lambda: membership.halves(9, 3, 0), "an even number of shadows"),
        (
            lambda: membership.likelihood_ratio(np.ones(2), np.ones((2, 2)), [[1, 0], [1, 1]]),
            "question 0 is in the training data of all 2 shadow models",
        ),
        (
            lambda: membership.likelihood_ratio(np.ones(2), np.ones((2, 2)), [[1, 0], [0, 1]]),
            "no question was left out by two",
        ),
        (lambda: users.source(np.ones((1, 4))), "of at least two clients"),
        (lambda: extraction.said([], [], 0), "words must be at least 1"),
        (lambda: r_precision([1.0], [False]), "no scored item is true"),
        (lambda: placed(np.eye(4), np.ones((1, 4))), "full rank 4"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_more_seeds_of_the_same_questions_do_not_narrow_what_questions_vary():
    rng = np.random.default_rng(0)
    member = np.arange(60) < 30
    attack = Attack(rng.normal(size=60) + 0.5 * member, member, np.arange(60) % 12)
    one = estimate(auc, [attack], same_questions=True)
    three = estimate(auc, [attack] * 3, same_questions=True)
    np.testing.assert_allclose(three, one)
    several = estimate(auc, [attack] * 8)  # of other questions
    assert several[2] - several[1] < 0.7 * (one[2] - one[1])
