"""Single questions of benchmarks: how answers are read and scored, and which examples are shown."""

import math

import numpy as np
import pytest

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.benchmarks import asking, results, scoring, sets


def test_length_counts_in_the_sum_and_not_in_the_mean():
    q = Question("a", "?", (), ("short", "quite long"), 1)
    found = scoring.likeliest(q, q.choices, np.array([-2.0, -3.0]), [1, 4])
    # -2/1 and -3/4 by token; -2/5 and -3/10 by byte.
    assert found == {"accuracy": 0.0, "accuracy_per_token": 1.0, "accuracy_per_byte": 1.0}
    # Bytes and no characters: -4/6 and -3/4, where -4/3 would lose.
    q = Question("a", "?", (), ("ééé", "long"), 0)
    found = scoring.likeliest(q, q.choices, np.array([-4.0, -3.0]), [3, 1])
    assert found == {"accuracy": 0.0, "accuracy_per_token": 1.0, "accuracy_per_byte": 1.0}


def test_choices_are_shown_by_letter_where_their_letters_are_scored():
    q = Question("a", "Which?", (), ("Rome", "Oslo", "Lima"), 1)
    assert asking.words(q, "choices", "letters") == "Which?\nA. Rome\nB. Oslo\nC. Lima"
    assert asking.continuations(q, "letters") == ["A", "B", "C"]
    assert asking.right(q, "choices", "letters") == "B"
    assert asking.continuations(q, "likelihood") == ("Rome", "Oslo", "Lima")


def test_a_choice_without_a_normal_form_is_told_from_another():
    q = Question("a", "Which article?", (), ("a", "the", "an", "none"), 1)
    assert asking.parsed("A", q, "choices") == asking.parsed("A. a", q, "choices") == 0
    assert asking.parsed("B. the", q, "choices") == 1
    assert asking.parsed("B. an", q, "choices") is None


def test_an_answer_without_a_normal_form_is_no_abstention():
    known, q = sets.SETS["squad_v2"], Question("a", "Which vitamin?", ("A",))
    assert scoring.open_answer(known, q, "A") == {
        "em": 1.0, "f1": 1.0, "abstained": 0.0, "answerable_em": 1.0,
        "unanswerable_em": pytest.approx(math.nan, nan_ok=True),
    }  # fmt: skip
    assert scoring.open_answer(known, q, "")["abstained"] == 1.0
    told = [Passage("p", "", "Carrots have vitamin A in them."), Passage("q", "", "A carrot?")]
    assert scoring.answer_in_passages(q, told[:1]) == {"answer_in_passages": 1.0}
    assert scoring.answer_in_passages(q, [Passage("r", "", "Carrots have a lot.")]) == {
        "answer_in_passages": 0.0
    }


def test_punctuation_separates_words_in_triviaqa():
    """As in triviaqa_evaluation.py, where SQuAD's script joins them."""
    known = sets.SETS["triviaqa"]
    for said, answer in (
        ("Spider Man", "Spider-Man"), ("rock 'n' roll", "rock ’n’ roll"), ("the_A-Team", "team"),
    ):  # fmt: skip
        q = Question("a", "Who?", (answer,))
        assert scoring.open_answer(known, q, said)["em"] == 1.0
        assert scoring.open_answer(sets.SETS["squad"], q, said)["em"] == 0.0


def test_a_set_can_be_scored_by_another_rule():
    q = Question("a", "哪里？", ("北京大学",))
    by = {r: sets.scored_by(sets.SETS["squad"], r) for r in ("squad", "zh")}
    assert scoring.open_answer(by["squad"], q, "北京大学医院")["f1"] == 0.0
    assert scoring.open_answer(by["zh"], q, "北京大学医院")["f1"] == pytest.approx(0.8)
    with pytest.raises(ConfigError, match=r"the rule must be one of .* got 'cn'"):
        sets.scored_by(sets.SETS["squad"], "cn")
    with pytest.raises(ConfigError, match="mmlu has none"):
        sets.scored_by(sets.SETS["mmlu"], "zh")


@pytest.mark.parametrize(
    "said, place",
    [("B", 1), ("(C)", 2), ("A.", 0), ("B: Oslo", 1), ("D) the bonn", 3), ("B. Rome", None),
     ("A man", None), ("E", None), ("", None), ("b", None), ("AB", None), ("Oslo", None)],
)  # fmt: skip
def test_letters_are_read_strictly(said, place):
    q = Question("a", "Which?", (), ("Rome", "Oslo", "Lima", "Bonn"), 1)
    assert asking.parsed(said, q, "choices") == place
    assert asking.words(q, "choices", "generation") == (
        "Which?\nA. Rome\nB. Oslo\nC. Lima\nD. Bonn\nAnswer with the letter alone."
    )
    assert asking.words(q, "choices", "likelihood") == "Which?"


@pytest.mark.parametrize(
    "said, place",
    [("yes", 0), ("No, it does not.", 1), ("Maybe", 2), ("It does: yes", None), ("no answer", None),
     ("nothing", None), ("", None)],
)  # fmt: skip
def test_labels_are_the_first_word(said, place):
    q = Question("a", "Is it?", (), ("yes", "no", "maybe"), 1)
    assert asking.parsed(said, q, "labels") == place
    assert asking.words(q, "labels", "generation") == "Is it?\nAnswer yes, no or maybe."
    assert scoring.chosen(q, place)["unparsable"] == (place is None)


def test_open_questions_are_scored_by_the_rule_of_their_set():
    yes = Question("a", "?", ("yes",))
    hotpotqa, v2 = sets.SETS["hotpotqa"], sets.SETS["squad_v2"]
    assert scoring.open_answer(hotpotqa, yes, "yes it is")["f1"] == 0.0
    assert scoring.open_answer(sets.SETS["squad"], yes, "yes it is")["f1"] == 0.5
    popqa = scoring.open_answer(
        sets.SETS["popqa"], Question("a", "?", ("Oslo",)), "In Oslo, Norway"
    )
    assert (popqa["em"], popqa["substring"]) == (0.0, 1.0)
    none, some = Question("a", "?"), Question("b", "?", ("Oslo",))
    right = scoring.open_answer(v2, none, "I don't know.")
    assert right["em"] == right["unanswerable_em"] == 1.0 and math.isnan(right["answerable_em"])
    assert scoring.open_answer(v2, none, "Oslo")["em"] == 0.0
    wrong = scoring.open_answer(v2, some, "unanswerable")
    assert wrong["em"] == 0.0 and wrong["abstained"] == 1.0 and math.isnan(wrong["unanswerable_em"])


def test_means_leave_out_whom_a_score_does_not_apply_to():
    rows = [{"scores": {"a": s, "none": None}} for s in (0.0, 0.0, 0.0, None, 1.0)]
    found = results.summed(rows, np.arange(5))
    assert found["a"].mean == 25.0 and found["a"].n == 4
    assert found["a"].low <= 25.0 <= found["a"].high
    assert found["none"] == (None, None, None, 0)


def test_questions_about_one_article_are_drawn_together():
    scores = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 25)
    rows = [{"scores": {"em": float(s)}} for s in scores]
    alone = results.summed(rows, np.arange(200))["em"]
    articles = results.summed(rows, np.arange(200) // 25)["em"]
    assert alone.mean == articles.mean == 62.5
    assert articles.high - articles.low > 3 * (alone.high - alone.low)


def test_examples_are_of_the_group_and_never_the_question():
    shown = [Question(str(i), f"Q {i}?", (), ("x", "y"), 0, (), f"g{i % 2}") for i in range(12)]
    twin = Question("other id", "the Q 4?", (), ("x", "y"), 0, (), "g0")
    for seed in range(20):
        for q in (*shown, twin):
            found = asking.examples_for(q, shown, 3, seed)
            assert len({e.id for e in found}) == 3 and all(e.group == q.group for e in found)
            assert q.id not in {e.id for e in found}
            assert q is not twin or "4" not in {e.id for e in found}
    assert asking.examples_for(twin, shown, 3, 0) != asking.examples_for(twin, shown, 3, 1)
    with pytest.raises(ConfigError, match=r"at most 5, the examples of 'g0' .*got 6"):
        asking.examples_for(twin, shown, 6, 0)
    aside, asked = asking.set_aside(shown, 3)
    assert len(aside) == 3 and {*aside} | {*asked} == {*shown} and not {*aside} & {*asked}
