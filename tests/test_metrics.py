"""Answer scores against cases worked by hand; rankings against loops that cannot be wrong."""

import collections
import re
import string

import numpy as np
import pytest

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.metrics import (
    answer_recall_at_k,
    exact_match,
    f1,
    mrr,
    normalize_answer,
    percent,
    recall_all_at_k,
    recall_at_k,
    recall_fraction_at_k,
    score_answers,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat.", "cat sat"),
        ("an A THE a", ""),
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),  # punctuation goes before articles, so no article is left to remove
        ("1,000\n\tapples", "1000 apples"),
        ("«L’été» — 5", "«l’été» — 5"),  # ASCII punctuation only
        ("“a”", "“ ”"),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match():
    assert exact_match("the Denver Broncos!", ["Carolina", "Denver Broncos"]) == 1.0
    assert exact_match("Denver", ["Denver Broncos"]) == 0.0
    assert exact_match("", ["the"]) == 1.0  # both are empty after normalisation, as in SQuAD


def test_f1():
    # 2 shared words; precision 2/3, recall 2/4: 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7.
    assert f1("red green blue", ["red blue old new"]) == pytest.approx(4 / 7)
    assert f1("red green blue", ["red blue old new", "green"]) == pytest.approx(4 / 7)
    assert f1("red green blue", ["blue", "Red, the green blue."]) == 1.0
    # Bags, not sets: "x x" shares one word with "x", precision 1/2, recall 1.
    assert f1("x x", ["x"]) == pytest.approx(2 / 3)
    assert f1("", ["x"]) == f1("x", ["the"]) == f1("", ["the"]) == 0.0


def test_answer_scores_agree_with_the_official_script():
    def normal(s):
        s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

    def official_f1(prediction, truth):
        p, t = normal(prediction).split(), normal(truth).split()
        same = sum((collections.Counter(p) & collections.Counter(t)).values())
        if same == 0:
            return 0
        return 2 * (same / len(p)) * (same / len(t)) / (same / len(p) + same / len(t))

    rng = np.random.default_rng(0)
    words = ["The", "a", "cat", "Cat.", "dog", "1,000", "dog's", "é", "-"]
    draw = lambda: " ".join(rng.choice(words, rng.integers(0, 5)))  # noqa: E731
    predictions = [draw() for _ in range(300)]
    answers = [[draw() for _ in range(rng.integers(1, 4))] for _ in range(300)]
    scores = score_answers(predictions, answers)
    pairs = list(zip(predictions, answers, strict=True))
    assert scores["em"].tolist() == [max(normal(p) == normal(t) for t in a) for p, a in pairs]
    np.testing.assert_allclose(
        scores["f1"], [max(official_f1(p, t) for t in a) for p, a in pairs], rtol=1e-15
    )
    assert 0 < scores["em"].mean() < scores["f1"].mean() < 1


def test_answers_must_be_a_list():
    for answers in ("Paris", []):
        with pytest.raises(DataError, match="list of at least one string"):
            exact_match("Paris", answers)
        with pytest.raises(DataError, match="list of at least one string"):
            f1("Paris", answers)


def test_percent():
    assert percent([1, 0, 0, 0]) == 25.0
    assert percent([0.0] * 9 + [1.0]) == 10.0
    assert percent([[1, 1], [0, 0]]) == 50.0
    with pytest.raises(DataError, match="no question was scored"):
        percent([])


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


def test_answer_recall():
    texts = ["The focus was here.", "He lived in the US, then Rome.", "Nothing"]
    ranked = [[0, 1, 2]] * 4
    answers = [["us"], ["Paris", "rome"], ["the"], ["U.S. then"]]
    assert answer_recall_at_k(ranked, texts, answers, 1).tolist() == [0, 0, 0, 0]
    assert answer_recall_at_k(ranked, texts, answers, 2).tolist() == [1, 1, 0, 1]


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
