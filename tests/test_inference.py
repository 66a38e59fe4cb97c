"""Every way to answer from several passages against a slow one; where they must agree, they do."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import characters

from fedrag_jax.data import synthetic
from fedrag_jax.data.answers import normalize_answer
from fedrag_jax.errors import ConfigError, NotFiniteError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.evaluation.metrics import f1
from fedrag_jax.generation.inference import (
    BEAMS,
    MODES,
    next_token_log_probs,
    sequence_log_probs,
)
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem

pytestmark = pytest.mark.usefixtures("strict_types")

# Few letters, so that passages agree, and texts that differ have one normal form: "b." is "B".
TOKENIZER = characters("Bb.Cc ")
EOS, SIZE, K, WHOLE = 2, 10, 4, 12
SAMPLING = Sampling(max_new_tokens=3)
APART = [mode for mode in MODES if mode != "concatenated"]


@pytest.fixture(scope="module")
def writer():
    network = Network.of(Decoder, DecoderConfig(SIZE, 16, 24, 2, 4, 2, 4))
    params = network.init(jax.random.key(0))
    params["embed"]["embedding"] = 0.7 * jax.random.normal(jax.random.key(4), (SIZE, 16))
    network = add_lora(network, LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.2, init_adapters(network, 0))
    return Writer(network, params, TOKENIZER, (EOS,), adapters)


@pytest.fixture(scope="module")
def asked():
    """Prompts [B][K] of letters and log p(z|x) [B, K]."""
    rng = np.random.default_rng(3)
    prompts = [[rng.integers(4, SIZE, n) for n in rng.integers(1, 7, K)] for _ in range(24)]
    return prompts, np.asarray(jax.nn.log_softmax(rng.normal(size=(24, K))))


def answers(mode, writer, prompts, log_weights, beams=None):
    beams = BEAMS.get(mode, 1) if beams is None else beams
    return [c.text for c in MODES[mode](writer, prompts, log_weights, SAMPLING, beams)]


@functools.partial(jax.jit, static_argnums=0)
def all_logits(network, params, adapters, tokens):
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(params, tokens, index, jnp.ones_like(tokens), adapters=adapters)
    return network(params, hidden, method="logits", adapters=adapters)


def next_log_probs(writer, prompt, text):
    row = [*map(int, prompt), *text]
    tokens = np.array([row + [0] * (WHOLE - len(row))])
    scores = all_logits(writer.network, writer.params, writer.adapters, tokens)[0, len(row) - 1]
    scores = np.asarray(scores, float)
    return scores - np.log(np.exp(scores).sum())


def forced(writer, prompt, text):
    """log p of each token of a text after a prompt."""
    return np.array([next_log_probs(writer, prompt, text[:n])[y] for n, y in enumerate(text)])


def slow_own(writer, prompt, beams):
    """The likeliest texts after one prompt, best first."""
    beam = [(0.0, ())]
    for _ in range(SAMPLING.max_new_tokens):
        longer = [(s, t) for s, t in beam if t[-1:] == (EOS,)]
        for score, text in beam:
            if text[-1:] != (EOS,):
                found = next_log_probs(writer, prompt, text)
                longer += [(score + p, (*text, y)) for y, p in enumerate(found)]
        beam = sorted(longer, reverse=True)[:beams]
    return [text for _, text in beam]


def text_of(tokens):
    return TOKENIZER.decode([t for t in tokens if t != EOS], skip_special_tokens=True)


def slow_sequence(writer, prompts, log_weights, beams, thorough):
    own = [slow_own(writer, prompt, beams) for prompt in prompts]
    probs = {}
    for y in {y for some in own for y in some}:
        probs[y] = sum(
            math.exp(r + forced(writer, prompt, y).sum())
            for prompt, r, found in zip(prompts, log_weights, own, strict=True)
            if thorough or y in found
        )
    return text_of(max(probs, key=probs.get))


@pytest.mark.parametrize("beams", [1, 3])
def test_rag_sequence_against_explicit_sums(writer, asked, beams):
    found = {}
    for mode, thorough in (("rag_sequence_thorough", True), ("rag_sequence_fast", False)):
        found[mode] = answers(mode, writer, *asked, beams)
        slow = [slow_sequence(writer, *one, beams, thorough) for one in zip(*asked, strict=True)]
        assert found[mode] == slow
    assert len(set(slow)) > 3
    assert found["rag_sequence_thorough"] != found["rag_sequence_fast"]


def test_a_likely_answer_of_few_can_lose_to_one_that_all_allow(writer, asked):
    """Fast takes what one passage is sure of; thorough knows how unlikely the others find it."""
    prompts, log_weights = asked
    fast = answers("rag_sequence_fast", writer, prompts, log_weights)
    thorough = answers("rag_sequence_thorough", writer, prompts, log_weights)
    i = next(i for i in range(len(fast)) if fast[i] != thorough[i])
    own = {text_of(slow_own(writer, p, 1)[0]): slow_own(writer, p, 1)[0] for p in prompts[i]}

    def total(text):
        joint = [
            r + forced(writer, p, own[text]).sum()
            for p, r in zip(prompts[i], log_weights[i], strict=True)
        ]
        return np.exp(joint).sum()

    assert total(thorough[i]) > total(fast[i])


def slow_vote(writer, prompts, log_weights, normal=normalize_answer):
    votes, texts = {}, []
    for prompt, r in zip(prompts, log_weights, strict=True):
        (tokens,) = slow_own(writer, prompt, 1)
        weight = math.exp(forced(writer, prompt, tokens).mean()) * math.exp(r)
        text = text_of(tokens)
        votes[normal(text)] = votes.get(normal(text), 0) + weight
        texts.append((weight, text))
    best = max(votes, key=votes.get)
    return max((weight, text) for weight, text in texts if normal(text) == best)[1]


def test_vote_against_a_count_by_hand(writer, asked):
    found = answers("vote", writer, *asked)
    form = lambda text: normalize_answer(text) or text.strip().lower()  # noqa: E731
    assert found == [slow_vote(writer, *one, form) for one in zip(*asked, strict=True)]
    by_string = [slow_vote(writer, *one, str) for one in zip(*asked, strict=True)]
    alone = [
        max(zip(r, some, strict=True), key=lambda pair: pair[0])[1]
        for some, r in zip(*asked, strict=True)
    ]
    alone = [text_of(slow_own(writer, prompt, 1)[0]) for prompt in alone]
    assert found != by_string  # the normal form matters
    assert found != alone  # and so do the others


def test_the_ensemble_is_rag_token_with_one_beam(writer, asked):
    prompts, log_weights = asked
    found = answers("ensemble", writer, *asked)
    assert found == answers("rag_token", writer, *asked, beams=1)
    for some, r, answer in zip(prompts, log_weights, found, strict=True):
        text = ()
        while len(text) < SAMPLING.max_new_tokens and text[-1:] != (EOS,):
            probs = [np.exp(next_log_probs(writer, prompt, text)) for prompt in some]
            text = (*text, int((np.exp(r) @ np.array(probs)).argmax()))
        assert answer == text_of(text)
    assert found != answers("rag_token", writer, *asked, beams=8)
    assert found != answers("vote", writer, *asked)


@pytest.mark.parametrize("mode", APART)
def test_one_passage_is_concatenated(writer, asked, mode):
    prompts = [some[:1] for some in asked[0]]
    one = answers("concatenated", writer, prompts, None)
    assert answers(mode, writer, prompts, np.zeros((len(prompts), 1)), beams=1) == one
    assert len(set(one)) > 3


@pytest.mark.parametrize("mode", APART)
def test_identical_passages_are_one(writer, asked, mode):
    prompts = [some[:1] for some in asked[0]]
    uniform = np.full((len(prompts), K), -np.log(K))
    many = answers(mode, writer, [some * K for some in prompts], uniform)
    assert many == answers(mode, writer, prompts, np.zeros((len(prompts), 1)))


@pytest.mark.parametrize("mode", APART)
def test_the_order_of_passages_does_not_matter(writer, asked, mode):
    prompts, log_weights = asked
    order = [2, 0, 3, 1]
    turned = [[some[z] for z in order] for some in prompts]
    found = answers(mode, writer, prompts, log_weights)
    assert answers(mode, writer, turned, log_weights[:, order]) == found
    assert answers(mode, writer, prompts, log_weights[:, order]) != found


@pytest.mark.parametrize("mode", APART)
def test_no_questions_have_no_answers(writer, mode):
    assert answers(mode, writer, [], np.zeros((0, K))) == []


# --- a whole system -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return synthetic.generate()


@pytest.fixture(scope="module")
def system(world):
    return RAGSystem.build(world.passages[:300], world.train[:50], score_scale=10.0, top_k=3)


@pytest.mark.slow
def test_a_system_answers_by_mode(world, system):
    questions = [e.question for e in world.test[:12]]
    rows, cosines = system.retriever.search(questions, 3)
    np.testing.assert_allclose(system.retriever.similarities(questions, rows), cosines, atol=1e-5)
    writer, found = system.writer, {}
    prompts = [
        [system.prompts.prompt(q, [z]) for z in r] for q, r in zip(questions, rows, strict=True)
    ]
    log_weights = np.asarray(jax.nn.log_softmax(10.0 * cosines))
    for mode in APART:
        found[mode] = [r.answer for r in system.batch_query(questions, mode=mode)]
        assert system.answer(questions, rows, mode=mode) == found[mode]
        direct = MODES[mode](writer, prompts, log_weights, Sampling(), BEAMS.get(mode, 1))
        assert [completion.text.strip() for completion in direct] == found[mode]
        one = system.answer(questions, rows[:, :1], mode=mode, beams=1 if mode in BEAMS else None)
        assert one == system.answer(questions, rows[:, :1])
    usual = [r.answer for r in system.batch_query(questions)]
    assert usual == system.answer(questions, rows, mode="concatenated")
    assert any(found[mode] != usual for mode in APART)
    assert system.query(questions[0], mode="vote").answer == found["vote"][0]


def test_stop_strings_end_answers_in_all_modes(world, system):
    question = world.test[3].question
    for mode in MODES:
        whole = system.query(question, mode=mode).answer
        cut = system.query(question, mode=mode, stop=(whole[2:4],)).answer
        assert len(whole) > 4 and whole[2:4] not in cut, mode


def test_evaluation_takes_a_mode(world, system):
    known = {p.id for p in system.retriever.passages}
    some = [e for e in world.test if set(e.positive_ids) <= known][:10]
    scores = evaluator.evaluate(system, some, mode="rag_token", beams=2)
    answered = system.batch_query([e.question for e in some], mode="rag_token", beams=2)
    em = [float(r.answer in e.answers) for r, e in zip(answered, some, strict=True)]
    np.testing.assert_array_equal(scores["em"], em)
    assert set(scores) == {"em", "f1", "recall_at_5", "mrr"}
    by_character = evaluator.evaluate(system, some, "zh", mode="rag_token", beams=2)
    expected = [f1(r.answer, e.answers, "zh") for r, e in zip(answered, some, strict=True)]
    np.testing.assert_array_equal(by_character["f1"], expected)


def test_refuses_what_a_mode_cannot_do(system):
    with pytest.raises(ConfigError, match=r"mode must be one of \['concatenated', .* got 'fusion'"):
        system.query("Who?", mode="fusion")
    with pytest.raises(ConfigError, match="mode 'vote' takes no beams, got 2"):
        system.query("Who?", mode="vote", beams=2)
    with pytest.raises(ConfigError, match="beams must be at least 1, got 0"):
        system.query("Who?", mode="rag_token", beams=0)
    with pytest.raises(ConfigError, match=r"'ensemble' takes the likeliest .* temperature 0\.5"):
        system.query("Who?", mode="ensemble", temperature=0.5)
    with pytest.raises(ConfigError, match=r"equally many passages .* got \[0, 1\]"):
        system.answer(["Who?", "What?"], [(), (1,)], mode="ensemble")
    with pytest.raises(ConfigError, match="mode 'vote' cannot be streamed"):
        next(system.stream("Who?", mode="vote"))


def test_answers_without_a_normal_form_do_not_vote_together(writer, asked):
    """Votes of 0.3 each for a blank answer and for "?", and 0.4 for a word: the word wins."""
    prompts = [prompt for some in asked[0] for prompt in some]
    said = dict(
        zip((c.text.strip() for c in writer.complete(prompts, SAMPLING)), prompts, strict=True)
    )
    some = [said[""], said["?"], said["c"]]
    chances = [math.exp(c.log_probs.mean()) for c in writer.complete(some, SAMPLING)]
    weights = np.array([0.3, 0.3, 0.4]) / chances
    assert answers("vote", writer, [some], np.log([weights])) == ["c"]


# --- numbers that are none --------------------------------------------------------------------------


def broken(writer, how):
    """The writer with logits that are not finite: all of them, one of them, or from a token on."""
    params = jax.tree.map(np.array, writer.params)
    if how == "all":
        params["norm"]["scale"][3] = np.nan
    elif how == "one":  # infinite, of either sign
        params["lm_head"]["kernel"][:, 7] = 0
        params["lm_head"]["kernel"][0, 7] = np.inf
    else:
        params["embed"]["embedding"][how] = np.nan
    return dataclasses.replace(writer, params=params)


@pytest.mark.parametrize("how", ["all", "one"])
def test_logits_that_are_no_numbers_are_no_answer(writer, asked, how):
    prompts, log_weights = asked[0][:4], asked[1][:4]
    bad = broken(writer, how)
    for mode in MODES:
        some = [p[:1] for p in prompts] if mode == "concatenated" else prompts
        weights = None if mode == "concatenated" else log_weights
        with pytest.raises(NotFiniteError, match=r"logits are NaN or infinite"):
            answers(mode, bad, some, weights)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):
        with pytest.raises(NotFiniteError):
            bad.complete([p[0] for p in prompts], sampling)
    with pytest.raises(NotFiniteError):
        "".join(bad.stream(prompts[0][0], SAMPLING))
    with pytest.raises(NotFiniteError):
        sequence_log_probs(bad, prompts, [np.array([5, 6])] * 4)


def test_tokens_after_a_prompt_are_scored_by_one_reading_of_it(writer, asked):
    prompts = [some[0] for some in asked[0]]
    tokens = [np.arange(4, 4 + 2 + i % 3) for i in range(len(prompts))]
    found = next_token_log_probs(writer, prompts, tokens)
    for prompt, some, log_probs in zip(prompts, tokens, found, strict=True):
        logits = all_logits(writer.network, writer.params, writer.adapters, prompt[None])[0, -1]
        wanted = np.asarray(jax.nn.log_softmax(logits))[some]
        np.testing.assert_allclose(log_probs, wanted, atol=1e-5)
        alone = [[y] for y in some]
        (again,) = sequence_log_probs(writer, [[prompt]], [np.array(alone[0])])
        np.testing.assert_allclose(log_probs[:1], again, atol=1e-5)
    with pytest.raises(NotFiniteError):
        next_token_log_probs(broken(writer, "all"), prompts, tokens)


def test_they_are_found_when_they_come_later(writer):
    prompt = np.array([4, 5, 6])
    (written,) = writer.complete([prompt], SAMPLING)
    first = int(written.tokens[0])
    assert first not in prompt and first != EOS
    for write in (
        lambda bad: bad.complete([prompt], SAMPLING),
        lambda bad: list(bad.stream(prompt, SAMPLING)),
        lambda bad: bad.search([[prompt]], np.zeros((1, 1)), beams=2, sampling=SAMPLING),
    ):
        with pytest.raises(NotFiniteError):
            write(broken(writer, first))


def test_what_comes_after_the_end_of_a_text_does_not_matter(writer, asked):
    """The token that ends it is read as long as others go on."""
    sampling, prompts = SAMPLING, [p[0] for p in asked[0]]
    found = [w.complete(prompts, sampling) for w in (writer, broken(writer, EOS))]
    assert {"stop", "length"} == {c.finish for c in found[0]}
    assert [c.text for c in found[0]] == [c.text for c in found[1]]
    found = [w.search(*asked, 3, 2, sampling) for w in (writer, broken(writer, EOS))]
    one, other = ([[c.text for c in some] for some in texts] for texts in found)
    assert one == other
