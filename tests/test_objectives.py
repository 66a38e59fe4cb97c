"""Generator and joint losses against slow, obvious versions."""

import types

import numpy as np
import pytest
from toy_rag import EXAMPLES, KEY, TOKENIZER, batch_of, joint_task, rows, slow_log_probs, toy_parts

from fedrag_jax.evaluation.evaluator import answer_nll
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.objectives.generator import concatenated, ralt
from fedrag_jax.objectives.joint import rag_sequence, rag_token

pytestmark = pytest.mark.usefixtures("strict_types")


@pytest.fixture(scope="module")
def parts():
    return toy_parts()


def test_answer_log_probs_are_those_of_one_token_after_another(parts):
    table = parts.prompts.training_table(EXAMPLES, rows(2)(EXAMPLES), per_passage=True)
    found = answer_log_probs(parts.decoder, parts.params, parts.adapters, table)
    assert found.shape == (4, 2, len(" Bonn town") + 1)
    for i, example in enumerate(EXAMPLES):
        for j, row in enumerate(rows(2)(EXAMPLES)[i]):
            slow = slow_log_probs(parts, example.question, [row], example.answers[0])
            np.testing.assert_allclose(found[i, j, : len(slow)], slow, atol=1e-4)
            assert table["answer_mask"][i].sum() == len(slow)


def test_only_the_answer_and_its_eos_are_scored(parts):
    table = parts.prompts.training_table(EXAMPLES, rows(2)(EXAMPLES), per_passage=False)
    for i, example in enumerate(EXAMPLES):
        positions = table["answer_positions"][i, 0][table["answer_mask"][i] > 0]
        scored = table["tokens"][i, 0][positions]
        np.testing.assert_array_equal(scored, parts.prompts.answer_tokens(example.answers[0]))
        assert scored[-1] == TOKENIZER.eos_token_id
        assert table["lengths"][i, 0] == positions[-1] + 1


def test_concatenated_is_the_mean_over_examples_of_the_summed_nll(parts):
    task = concatenated(parts.decoder, parts.params, parts.adapters, parts.prompts, rows(3))
    weight = (1, 1, 0, 1)
    loss, told = task.loss(task.trainable, task.frozen, batch_of(task, weight), KEY)
    slow = [-slow_log_probs(parts, e.question, rows(3)([e])[0], e.answers[0]) for e in EXAMPLES]
    assert len({len(nll) for nll in slow}) > 1
    expected = np.average([[nll.sum(), nll.mean()] for nll in slow], axis=0, weights=weight)
    np.testing.assert_allclose([loss, told["nll_per_token"]], expected, rtol=1e-4)


def test_ralt_sums_over_passages_and_is_concatenated_at_one(parts):
    arguments = parts.decoder, parts.params, parts.adapters, parts.prompts
    task = ralt(*arguments, rows(2))
    loss, told = task.loss(task.trainable, task.frozen, batch_of(task), KEY)
    slow = [
        -np.array([slow_log_probs(parts, e.question, [r], e.answers[0]) for r in rows(2)([e])[0]])
        for e in EXAMPLES
    ]
    expected = np.mean([[nll.sum(), nll.mean()] for nll in slow], axis=0)
    np.testing.assert_allclose([loss, told["nll_per_token"]], expected, rtol=1e-4)
    one, same = ralt(*arguments, rows(1)), concatenated(*arguments, rows(1))
    np.testing.assert_allclose(
        one.loss(one.trainable, one.frozen, batch_of(one), KEY)[0],
        same.loss(same.trainable, same.frozen, batch_of(same), KEY)[0],
        rtol=1e-6,
    )


def test_the_nll_of_answers_is_that_of_their_own_tokens(parts):
    generator = types.SimpleNamespace(params=parts.params)
    system = types.SimpleNamespace(
        prompts=parts.prompts, decoder=parts.decoder, generator=generator, adapters=parts.adapters
    )
    slow = [-slow_log_probs(parts, e.question, rows(2)([e])[0], e.answers[0]) for e in EXAMPLES]
    assert len({len(nll) for nll in slow}) > 1
    found = answer_nll(system, EXAMPLES, rows(2)(EXAMPLES))
    np.testing.assert_allclose(found, [nll.sum() for nll in slow], rtol=1e-4)


def slow_marginals(log_probs, scores, mask):
    token, sequence = [], []
    for ll, s, m in zip(log_probs, scores, mask, strict=True):
        p = np.exp(s) / np.exp(s).sum()
        sequence.append(np.log(sum(p[z] * np.exp((ll[z] * m).sum()) for z in range(len(p)))))
        per_token = [np.log((p * np.exp(ll[:, i])).sum()) for i in range(len(m)) if m[i]]
        token.append(sum(per_token))
    return np.array(token), np.array(sequence)


def test_marginals_against_numpy():
    rng = np.random.default_rng(0)
    log_probs = -rng.exponential(1.5, (5, 3, 4)).astype(np.float32)
    scores = rng.normal(size=(5, 3)).astype(np.float32)
    mask = (np.arange(4) < rng.integers(1, 5, (5, 1))).astype(np.float32)
    token, sequence = slow_marginals(log_probs, scores, mask)
    np.testing.assert_allclose(rag_token(log_probs, scores, mask), token, rtol=1e-5)
    np.testing.assert_allclose(rag_sequence(log_probs, scores, mask), sequence, rtol=1e-5)
    assert np.abs(token - sequence).max() > 1e-3


def test_marginals_coincide_where_they_must():
    rng = np.random.default_rng(1)
    log_probs = -rng.exponential(1.5, (5, 3, 4)).astype(np.float32)
    scores = rng.normal(size=(5, 3)).astype(np.float32)
    one = np.zeros((5, 4), np.float32)
    one[np.arange(5), rng.integers(0, 4, 5)] = 1  # exactly one position, not always the first
    np.testing.assert_allclose(
        rag_token(log_probs, scores, one), rag_sequence(log_probs, scores, one), rtol=1e-5
    )
    mask = np.ones((5, 4), np.float32)
    plain = log_probs[:, :1].sum((1, 2))
    for marginal in (rag_token, rag_sequence):
        np.testing.assert_allclose(
            marginal(log_probs[:, :1], scores[:, :1], mask), plain, rtol=1e-5
        )


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_joint_loss_against_numpy(parts, marginal):
    task = joint_task(parts, marginal=marginal)
    loss, told = task.loss(task.trainable, task.frozen, batch_of(task), KEY)
    found, cosines = parts.retriever.search([e.question for e in EXAMPLES], 3)
    slow, entropies = [], []
    for e, retrieved, cosine in zip(EXAMPLES, found, cosines, strict=True):
        p = np.exp(20.0 * cosine) / np.exp(20.0 * cosine).sum()
        entropies.append(-(p * np.log(p)).sum())
        ll = np.stack([slow_log_probs(parts, e.question, [r], e.answers[0]) for r in retrieved])
        both = slow_marginals([ll], [20.0 * cosine], [np.ones(ll.shape[1])])
        slow.append(both[marginal == "sequence"][0])
    np.testing.assert_allclose(loss, -np.mean(slow), rtol=1e-4)
    np.testing.assert_allclose(told["retrieval_entropy"], np.mean(entropies), rtol=1e-4)


def test_joint_is_the_answer_nll_at_one_passage(parts):
    with pytest.warns(UserWarning, match="only the adapters learn"):
        joint = joint_task(parts, passages=1)
    loss, _ = joint.loss(joint.trainable, joint.frozen, batch_of(joint), KEY)
    found = parts.retriever.search([e.question for e in EXAMPLES], 1)[0]
    plain = concatenated(
        parts.decoder, parts.params, parts.adapters, parts.prompts, lambda examples: found
    )
    np.testing.assert_allclose(
        loss, plain.loss(plain.trainable, plain.frozen, batch_of(plain), KEY)[0], rtol=1e-5
    )


@pytest.mark.parametrize("train", [("adapters",), ("query",), ("adapters", "query", "document")])
def test_what_is_frozen_is_computed_once_and_changes_nothing(parts, train):
    """Phases of two-phase training, and document-side training, start from the joint loss."""
    joint, phase = joint_task(parts), joint_task(parts, train=train)
    np.testing.assert_allclose(
        phase.loss(phase.trainable, phase.frozen, batch_of(phase), KEY)[0],
        joint.loss(joint.trainable, joint.frozen, batch_of(joint), KEY)[0],
        rtol=1e-4,
    )
    cached = batch_of(phase)
    assert ("answer_log_probs" in cached) == ("adapters" not in train)
    assert ("retrieval_scores" in cached) == (train == ("adapters",))
