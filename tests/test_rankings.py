"""Rankings against loops that cannot be wrong, and against trec_eval."""

import numpy as np
import pytest

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.rankings import (
    answer_recall_at_k,
    average_precision,
    mrr,
    ndcg,
    recall_all_at_k,
    recall_at_k,
    recall_fraction_at_k,
)


def test_recalls_by_hand():
    ranked = np.array([[3, 1, 2], [9, 8, 7], [4, 5, 6]])
    golds = [{1, 2}, [1], {4}]
    assert recall_at_k(ranked, golds, 1).tolist() == [0, 0, 1]
    assert recall_at_k(ranked, golds, 2).tolist() == [1, 0, 1]
    assert recall_all_at_k(ranked, golds, 2).tolist() == [0, 0, 1]
    assert recall_all_at_k(ranked, golds, 3).tolist() == [1, 0, 1]
    assert recall_fraction_at_k(ranked, golds, 2).tolist() == [0.5, 0, 1]
    assert mrr(ranked, golds).tolist() == [0.5, 0, 1]
    assert mrr(ranked, golds, k=1).tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_rankings_agree_with_loops(kind, k):
    rng = np.random.default_rng(k)
    ranked = np.array([rng.permutation(30)[:12] for _ in range(200)]).astype(kind)
    golds = [rng.choice(30, rng.integers(1, 4), replace=False).astype(kind) for _ in range(200)]
    any_gold, every_gold, share, reciprocal = [], [], [], []
    for row, gold in zip(ranked, golds, strict=True):
        found = sum(1 for g in gold if any(g == p for p in row[:k]))
        any_gold.append(float(found > 0))
        every_gold.append(float(found == len(gold)))
        share.append(found / len(gold))
        rank = min([i for i in range(10) for g in gold if row[i] == g], default=None)
        reciprocal.append(0.0 if rank is None else 1 / (rank + 1))
    golds = [set(g.tolist()) for g in golds]
    assert recall_at_k(ranked, golds, k).tolist() == any_gold
    assert recall_all_at_k(ranked, golds, k).tolist() == every_gold
    assert recall_fraction_at_k(ranked, golds, k).tolist() == share
    assert mrr(ranked, golds).tolist() == reciprocal


def test_mrr_stops_at_ten():
    ranked = [list(range(20))] * 2
    assert mrr(ranked, [{9}, {10}]).tolist() == [0.1, 0.0]


@pytest.mark.parametrize("score", [mrr, ndcg, average_precision])
def test_no_question_with_a_gold_passage_has_no_scores(score):
    assert score(np.empty((0, 10), int), []).shape == (0,)


def test_answer_recall():
    texts = ["The focus was here.", "He lived in the US, then Rome.", "Grade A or A+"]
    ranked = [[0, 1, 2]] * 6
    answers = [["us"], ["Paris", "rome"], ["THE"], ["U.S. then"], ["A"], ["+", ""]]
    assert answer_recall_at_k(ranked, texts, answers, 1).tolist() == [0, 0, 0, 0, 0, 0]
    assert answer_recall_at_k(ranked, texts, answers, 2).tolist() == [1, 1, 0, 1, 0, 0]
    # An answer without a normal form is looked for as it is written, as a word of its own.
    assert answer_recall_at_k(ranked, texts, answers, 3).tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("score", [recall_at_k, recall_all_at_k, recall_fraction_at_k])
def test_rankings_that_cannot_be_scored_are_refused(score):
    for k in (0, 3):
        with pytest.raises(ConfigError, match=f"k must be between 1 and the 2.*got {k}"):
            score([[1, 2]], [{1}], k)
    with pytest.raises(ConfigError, match="one row for each of 2 questions"):
        score([[1, 2]], [{1}, {2}], 1)
    with pytest.raises(DataError, match="question number 1"):
        score([[1, 2], [1, 2]], [{1}, set()], 1)
    with pytest.raises(DataError, match="gold passages 'p1'"):
        score([["p1", "p2"]], ["p1"], 1)


def test_a_grade_of_zero_is_no_gold():
    ranked, golds = np.array([["a", "b", "c"]]), [{"a": 0, "b": 1}]
    assert recall_at_k(ranked, golds, 1).tolist() == [0]
    assert mrr(ranked, golds).tolist() == [0.5] == average_precision(ranked, golds).tolist()
    with pytest.raises(DataError, match="at least one gold id"):
        ndcg(ranked, [{"a": 0}])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="has a passage twice in its ranking"):
        average_precision(np.array([["a", "a"]]), [{"a"}])
    with pytest.raises(ConfigError, match="equally many passages for every question"):
        ndcg([["a", "b"], ["a"]], [{"a"}, {"a"}])
    with pytest.raises(ConfigError, match="rows of the 2 texts"):
        answer_recall_at_k([[0, -1]], ["x", "y"], [["x"]], 2)
    with pytest.raises(DataError, match="lists of strings, one list for each question"):
        answer_recall_at_k([[0], [1]], ["x", "y"], ["x", "y"], 1)


def test_ndcg_and_average_precision_by_hand():
    ranked = np.array([["a", "b", "c", "d"]])
    # Gains 1 / log2(3) and 1 / log2(5), of 1 and 1 / log2(3) at best.
    found = ndcg(ranked, [{"b", "d"}])
    assert found[0] == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert ndcg(ranked, [{"b", "d"}], k=2)[0] == pytest.approx(
        (1 / np.log2(3)) / (1 + 1 / np.log2(3))
    )
    assert ndcg(ranked, [{"a": 1, "b": 2}])[0] == pytest.approx(
        (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    )
    assert average_precision(ranked, [{"b", "d", "z"}])[0] == pytest.approx((1 / 2 + 2 / 4) / 3)


@pytest.mark.parametrize("graded", [False, True])
def test_rankings_equal_trec_eval(graded):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(int(graded))
    judged, runs, ranked = {}, {}, []
    for question in map(str, range(200)):
        passages = rng.choice(60, rng.integers(1, 8), replace=False)
        grades = rng.integers(0, 4, len(passages)) if graded else np.ones(len(passages), int)
        grades[0] = max(grades[0], 1)
        judged[question] = {f"p{p}": int(g) for p, g in zip(passages, grades, strict=True)}
        ranked.append([f"p{p}" for p in rng.permutation(60)[:40]])
        # Scores fall: trec_eval orders equals by id, backwards.
        runs[question] = {p: 100.0 - rank for rank, p in enumerate(ranked[-1])}
    evaluator = pytrec_eval.RelevanceEvaluator(
        judged, {"ndcg_cut.10", "map", "recall.5,20", "success.5,20", "recip_rank"}
    )
    theirs = evaluator.evaluate(runs)
    golds = [judged[q] for q in judged]
    for name, ours in {
        "ndcg_cut_10": ndcg(ranked, golds),
        "map": average_precision(ranked, golds),
        "recall_5": recall_fraction_at_k(ranked, golds, 5),
        "recall_20": recall_fraction_at_k(ranked, golds, 20),
        "success_5": recall_at_k(ranked, golds, 5),
        "success_20": recall_at_k(ranked, golds, 20),
        "recip_rank": mrr(ranked, golds, k=40),
    }.items():
        np.testing.assert_allclose(ours, [theirs[q][name] for q in judged], atol=1e-9)
        assert 0 < ours.mean() < 1
    # MRR@10 is the reciprocal rank of what is ranked among the first ten.
    first = {q: {p: s for p, s in run.items() if s > 90.0} for q, run in runs.items()}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first)
    np.testing.assert_allclose(mrr(ranked, golds), [theirs[q]["recip_rank"] for q in judged])
