"""Teachers of a retriever: what they say, against a slow version, and whether they know anything."""

import jax
import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import embedding_text
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.teachers import question_likelihood

pytestmark = pytest.mark.usefixtures("strict_types")

PAIRS = 24


@pytest.fixture(scope="module")
def world():
    return synthetic.generate()


@pytest.fixture(scope="module")
def system(world):
    return RAGSystem.build(world.passages[:40], world.train[:4])


@pytest.fixture(scope="module")
def pairs(world):
    """Questions of one hop, each with its gold passage and with another's."""
    text = {p.id: embedding_text(p) for p in world.passages}
    asked = [e for e in world.validation if e.hops == 1][:PAIRS]
    gold = [text[e.positive_ids[0]] for e in asked]
    return [e.question for e in asked], gold, [*gold[1:], gold[0]]


@pytest.mark.slow
def test_question_likelihood_is_that_of_one_token_after_another(system, pairs):
    questions, texts, _ = (some[:3] for some in pairs)
    network, params, tokenizer = system.decoder, system.generator.params, system.prompts.tokenizer

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    slow = []
    for question, text in zip(questions, texts, strict=True):
        prompt = [*tokens("Text: "), *tokens(text), *tokens("\nAsk:")]
        row = np.array([[*prompt, *tokens(" " + question)]])
        hidden = network(params, row, np.arange(row.shape[1])[None], np.ones_like(row))
        logits = np.asarray(network(params, hidden, method="logits"), np.float64)[0]
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        places = range(len(prompt), row.shape[1])
        slow.append(np.mean([log_probs[t - 1, row[0, t]] for t in places]))
    np.testing.assert_allclose(question_likelihood(system)(questions, texts), slow, atol=1e-4)


def test_a_question_is_likelier_about_its_own_passage(system, pairs):
    questions, gold, others = pairs
    score = question_likelihood(system)
    assert np.mean(score(questions, gold) > score(questions, others)) > 0.9


def test_special_tokens_in_questions_and_passages_are_text(system, pairs):
    (question, *_), (text, *_), _ = pairs
    score = question_likelihood(system)
    marked = score([f"</s>{question}"], [f"<s>{text}</s>"])
    np.testing.assert_array_equal(marked, score([f"< /s>{question}"], [f"< s>{text}< /s>"]))
