"""Rewards of rollouts, for answers, their form and searches."""

import numpy as np
import pytest

from fedrag_jax.data.examples import Example
from fedrag_jax.evaluation.rewards import ExactWithForm, F1WithForm, WithCost, WithRetrieval
from fedrag_jax.generation.rollouts import COMPACT_SEARCHING, TAGS, Part, Rollout
from fedrag_jax.generation.searching import Spelled
from fedrag_jax.models import hub


def rollout(*texts, found=()):
    none = np.zeros(0, np.float32)
    written = [Part(True, np.zeros(0, np.int32), none) for _ in texts]
    others = [Part(False, np.array(tokens, np.int32), none) for tokens in found]
    finish = "answer" if texts[-1].endswith(TAGS.answer[1]) else "length"
    queries = tuple(texts[:-1])
    return Rollout(np.zeros(0, np.int32), (*written, *others), queries, finish, texts)


ASKED = Example("q", "Which?", ("New York", "NYC"), ())
TRUTH = Example("t", "Is it?", ("yes",), ())


@pytest.mark.parametrize(
    ("example", "made", "by_f1", "by_em"),
    [
        (ASKED, rollout("<answer>New York</answer>"), 1.0, 1.0),
        (ASKED, rollout("<answer>York</answer>"), 2 / 3, 0.2),
        (ASKED, rollout("<answer>Bern</answer>"), 0.1, 0.2),
        (ASKED, rollout("<search>x</search>", "<answer>the NYC</answer>"), 1.0, 1.0),
        (ASKED, rollout("<search></search>", "<answer>NYC</answer>"), 0.0, 0.8),
        (ASKED, rollout("New York"), 0.0, 0.0),
        (ASKED, rollout("<answer></answer>"), 0.1, 0.2),
        (TRUTH, rollout("<answer>yes it is</answer>"), 0.1, 0.2),
        (TRUTH, rollout("<answer>Yes</answer>"), 1.0, 1.0),
    ],
)
def test_rewards(example, made, by_f1, by_em):
    assert F1WithForm()(example, made) == pytest.approx(by_f1)
    assert ExactWithForm()(example, made) == pytest.approx(by_em)


def test_searches_may_cost():
    reward = WithCost(F1WithForm(), 0.25)
    asked = rollout("<search>x</search>", "<search>y</search>", "<answer>NYC</answer>")
    assert reward(ASKED, asked) == pytest.approx(0.5)
    assert reward(ASKED, rollout("<search>x</search>", "<answer>Bern</answer>")) == 0
    # Down to 0 and no lower, and nothing is raised to it.
    for own, paid in ((-1.0, -1.0), (0.0, 0.0), (0.3, 0.0), (0.75, 0.25)):
        assert WithCost(lambda example, rollout, own=own: own, 0.25)(ASKED, asked) == paid


def test_finding_the_answer_may_count():
    reward = WithRetrieval(F1WithForm(), lambda tokens: "in nyc" if 7 in tokens else "", 0.25)
    assert reward(ASKED, rollout("<answer>Bern</answer>", found=[[7]])) == pytest.approx(0.35)
    assert reward(ASKED, rollout("<answer>Bern</answer>", found=[[8]])) == pytest.approx(0.1)
    # Letters of another word are no answer.
    inside = WithRetrieval(F1WithForm(), lambda tokens: "in nycteris", 0.25)
    assert inside(ASKED, rollout("<answer>Bern</answer>", found=[[7]])) == pytest.approx(0.1)


@pytest.mark.parametrize("most", [64, 8])
def test_the_question_that_follows_what_was_found_is_not_found(most):
    """Also if it leaves no room for anything else."""
    tokenizer, tags = hub.load("builtin:decoder").tokenizer, COMPACT_SEARCHING.tags
    spelled = Spelled(tokenizer, tags, most)
    reward = WithRetrieval(F1WithForm(), tokenizer.decode, 0.25, spelled.ending)
    example = Example("q", "Who is older, Ann or Bob?", ("Ann",), ())
    for text, bonus in (("Nothing of use.", 0), ("Ann is 9.", 0.25 * (most == 64))):
        made = rollout("<answer>Bob</answer>", found=[spelled(text, example.question)])
        assert reward(example, made) == pytest.approx(0.1 + bonus), text
