"""Answer scores against cases worked by hand, and against the rules of the official scripts."""

import collections
import re
import string
import sys
import unicodedata

import numpy as np
import pytest

from fedrag_jax.data.answers import normalize_answer
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation import metrics
from fedrag_jax.evaluation.metrics import (
    abstained,
    exact_match,
    f1,
    percent,
    rouge_l,
    score_answers,
    substring_match,
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


@pytest.mark.parametrize(
    ("rule", "prediction", "answers", "em", "word_f1"),
    [
        # Of evaluate-v2.0.py: a question without an answer wants none, and none alone.
        ("squad_v2", "", [], 1, 1),
        ("squad_v2", "the", [], 1, 1),
        ("squad_v2", "Rome", [], 0, 0),
        ("squad_v2", "", ["Rome"], 0, 0),
        ("squad_v2", "Rome", ["the", "Rome"], 1, 1),
        ("squad_v2", "", ["the", "Rome"], 0, 0),  # an answer without words is no answer
        ("squad_v2", "", ["the", "!"], 1, 1),
        ("squad_v2", "in Rome", ["Rome"], 0, 2 / 3),
        # Of evaluate-v1.1.py: nothing shared is nothing gained, whoever is empty.
        ("squad", "", ["the"], 1, 0),
        ("squad", "yes it is", ["yes"], 0, 0.5),
        # Of hotpot_evaluate_v1.py: yes, no and noanswer are all or nothing.
        ("hotpotqa", "yes it is", ["yes"], 0, 0),
        ("hotpotqa", "Yes.", ["yes"], 1, 1),
        ("hotpotqa", "no", ["no man's land"], 0, 0),
        ("hotpotqa", "noanswer", ["noanswer given"], 0, 0),
        ("hotpotqa", "not a man", ["a man"], 0, 2 / 3),
        # Punctuation of ASCII goes, and no other; articles are words, not letters.
        ("squad", "«Élan»", ["élan"], 0, 0),
        ("squad", "ÉLAN—vital", ["élan—vital"], 1, 1),
        ("squad", "An apple-tree, a day", ["appletree day"], 1, 1),
        ("squad", "İstanbul", ["i̇stanbul"], 1, 1),  # lower case of a letter may be two
    ],
)
def test_rules_of_the_official_scripts(rule, prediction, answers, em, word_f1):
    assert exact_match(prediction, answers, rule) == em
    assert f1(prediction, answers, rule) == pytest.approx(word_f1)
    scores = score_answers([prediction], [answers], rule)
    assert (scores["em"], scores["f1"]) == (em, pytest.approx(word_f1))


def test_an_unknown_rule_and_questions_without_answers_are_refused():
    for score in (exact_match, f1):
        with pytest.raises(ConfigError, match=r"'squad', 'squad_v2', 'hotpotqa'.*got 'trivia'"):
            score("x", ["x"], "trivia")
        with pytest.raises(DataError, match="list of at least one string"):
            score("x", "x", "squad_v2")
        with pytest.raises(DataError, match="list of at least one string"):
            score("x", [], "hotpotqa")


def test_substring_match_grows_with_what_is_said():
    assert substring_match("It is the Eiffel-Tower, I think", ["tower", "Eiffel Tower"]) == 1.0
    assert substring_match("Eiffel", ["Eiffel Tower"]) == 0.0
    assert substring_match("anything at all", ["the", "!"]) == 0.0
    assert substring_match("Vitamin A, mostly", ["A"]) == substring_match("A", ["A"]) == 1.0
    assert substring_match("a Vitamin", ["A"]) == substring_match("", ["A"]) == 0.0
    with pytest.raises(DataError, match="list of at least one string"):
        substring_match("x", [])


def test_rouge_l_is_that_of_its_package(monkeypatch):
    # The longest common subsequence of 3 words: precision 3/4, recall 3/6.
    assert rouge_l("police kill the gunman", ["the police did kill that gunman"]) == pytest.approx(
        0.6
    )
    assert rouge_l("Yes.", ["no", "YES"]) == 1.0
    with pytest.raises(DataError, match="list of at least one string"):
        rouge_l("x", "x")
    metrics._rouge.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedrag-jax\[rouge\]'"):
        rouge_l("x", ["x"])
    metrics._rouge.cache_clear()


def test_abstentions_are_told_from_answers():
    said = ["", " \n", "Unknown.", "I don't know", "noanswer", "The unknown soldier", "no"]
    assert abstained(said).tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert abstained(["A", "the", "An a", "+"]).tolist() == [0, 0, 0, 0]
    assert abstained(["weiß nicht"], ["Weiß nicht!"]).tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "prediction", "answers", "em", "by_character"),
    [
        # Of mlqa_evaluation_v1.py for Chinese: 4 of 6 and of 4 characters, 2 * 4/6 / (4/6 + 1).
        ("zh", "北京大学医院", ["北京大学"], 0, 0.8),
        ("zh", "《北京》。", ["北京"], 1, 1),  # punctuation of any script
        ("zh", "北 京", ["北京"], 1, 1),
        ("zh", "2008年8月8日", ["2008年8月"], 0, 0.8),  # 2008 年 8 月 8 日: 4 of 6 and of 4
        ("zh", "NASA 宇航员", ["nasa宇航员"], 1, 1),
        ("zh", "", ["北京"], 0, 0),
        ("zh", "the", ["a"], 0, 0),  # Chinese has no articles
        ("zh", "€5", ["5"], 0, 0),  # a symbol is no punctuation
        ("zh", "ひと", ["ひる"], 0, 0),  # to MLQA kana are letters of a word
        # As SQuAD does it a word without spaces is right or wrong.
        ("squad", "北京大学医院", ["北京大学"], 0, 0),
        # Japanese: 3 of 5 and of 3 characters, 2 * 3/5 / (3/5 + 1).
        ("ja", "東京タワー", ["東京都", "タワー"], 0, 0.75),
        ("ja", "「人々」", ["人々"], 1, 1),
        ("ja", "さくら", ["さけ"], 0, 0.4),  # 1 of 3 and of 2
        ("ja", "JR東日本", ["jr 東日本"], 1, 1),
    ],
)
def test_chinese_and_japanese_by_character(rule, prediction, answers, em, by_character):
    assert exact_match(prediction, answers, rule) == em
    assert f1(prediction, answers, rule) == pytest.approx(by_character)


def test_chinese_agrees_with_the_rule_of_mlqa():
    """Its steps one after another: lower case, punctuation, then each ideograph apart."""
    punctuation = {
        chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P")
    }
    punctuation |= {*string.punctuation}

    def words(text):
        found, word = [], ""
        for c in (c for c in text.lower() if c not in punctuation):
            if "\u4e00" <= c <= "\u9fa5":
                found += [*word.split(), c]
                word = ""
            else:
                word += c
        return found + word.split()

    def slow_f1(prediction, answer):
        p, a = words(prediction), words(answer)
        same = sum((collections.Counter(p) & collections.Counter(a)).values())
        return 2 * same / (len(p) + len(a)) if same else 0

    rng = np.random.default_rng(0)
    letters = [*"北京大学的一AaбĐ1 $+€。，《》「」・-'\u3000\u9fa6ひ"]
    draw = lambda: "".join(rng.choice(letters, rng.integers(0, 8)))  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(500)]
    for prediction, answer in pairs:
        assert f1(prediction, [answer], "zh") == pytest.approx(slow_f1(prediction, answer))
        same = words(prediction) == words(answer)
        assert exact_match(prediction, [answer], "zh") == same
