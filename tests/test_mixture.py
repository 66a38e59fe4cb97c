"""Beam search over mixtures against slow ones, without a cache, and against all texts there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import decoding, mixture
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network

pytestmark = pytest.mark.usefixtures("strict_types")

K, T, WHOLE = 3, 6, 20


def decoder(vocabulary):
    config = DecoderConfig(vocabulary, 16, 24, 2, 4, 2, 4)
    network = Network.of(Decoder, config)
    params = network.init(jax.random.key(0))
    params["embed"]["embedding"] = jax.random.normal(jax.random.key(1), (vocabulary, 16))
    network = lora.add_lora(network, lora.LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.3, lora.init_adapters(network, 0))
    return network, params, adapters


@pytest.fixture(scope="module")
def model():
    return decoder(30)


@pytest.fixture(scope="module")
def small():
    return decoder(4)


def asked(vocabulary=30, questions=4):
    """Prompts [B][K] of different lengths and log p(z|x) [B, K]."""
    rng = np.random.default_rng(0)
    prompts = [
        [rng.integers(0, vocabulary, n) for n in rng.integers(1, T + 1, K)]
        for _ in range(questions)
    ]
    return prompts, np.asarray(jax.nn.log_softmax(rng.normal(size=(questions, K))))


def padded(prompts):
    tokens = np.zeros((len(prompts), len(prompts[0]), T), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, z in np.ndindex(tokens.shape[:2]):
        tokens[i, z, T - len(prompts[i][z]) :] = prompts[i][z]
        mask[i, z, T - len(prompts[i][z]) :] = True
    return tokens, mask


def search(model, prompts, log_weights, **options):
    network, params, adapters = model
    inputs = *padded(prompts), log_weights
    return mixture.beam_search(network, params, *inputs, adapters=adapters, **options)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(network, params, adapters, tokens):
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(params, tokens, index, jnp.ones_like(tokens), adapters=adapters)
    return network(params, hidden, method="logits", adapters=adapters)


def mixed(model, prompts, log_weights, text):
    """p'(. | x, text) [V]: every prompt read anew with the whole text, one after another."""
    total = 0
    for prompt, log_weight in zip(prompts, log_weights, strict=True):
        row = [*prompt, *text]
        scores = all_logits(*model, np.array([row + [0] * (WHOLE - len(row))]))[0, len(row) - 1]
        probs = np.exp(np.asarray(scores, float))
        total = total + np.exp(log_weight) * probs / probs.sum()
    return total


def slow_beam(model, prompts, log_weights, beams, count, stops=()):
    """[(log p, text)], best first."""
    beam = [(0.0, ())]
    for _ in range(count):
        longer = []
        for score, text in beam:
            if text and text[-1] in stops:
                longer.append((score, text))
            else:
                probs = mixed(model, prompts, log_weights, text)
                longer += [(score + np.log(p), (*text, y)) for y, p in enumerate(probs)]
        beam = sorted(longer, reverse=True)[:beams]
    return beam


def assert_found(tokens, log_probs, expected, pad=0):
    for written, scores, (score, text) in zip(tokens, log_probs, expected, strict=True):
        np.testing.assert_array_equal(written[: len(text)], text)
        assert (written[len(text) :] == pad).all() and (scores[len(text) :] == 0).all()
        np.testing.assert_allclose(scores.sum(), score, atol=1e-4)


def test_one_beam_takes_the_likeliest_token_of_the_mixture(model):
    prompts, log_weights = asked()
    found = search(model, prompts, log_weights, max_new_tokens=8)
    assert found.tokens.shape == found.log_probs.shape == (4, 1, 8)
    for i, (some, weights) in enumerate(zip(prompts, log_weights, strict=True)):
        text, log_probs = [], []
        for _ in range(8):
            probs = mixed(model, some, weights, text)
            text.append(int(probs.argmax()))
            log_probs.append(np.log(probs.max()))
        np.testing.assert_array_equal(found.tokens[i, 0], text)
        np.testing.assert_allclose(found.log_probs[i, 0], log_probs, atol=1e-4)
    alone = search(model, [[some[0]] for some in prompts], np.zeros((4, 1)), max_new_tokens=8)
    assert not np.array_equal(alone.tokens, found.tokens)


def test_one_prompt_and_one_beam_are_greedy_decoding(model):
    network, params, adapters = model
    prompts, _ = asked()
    tokens, mask = padded(prompts)
    options = {"adapters": adapters, "stop_tokens": (9, 8), "pad_token": 29, "max_new_tokens": 9}
    greedy = decoding.generate(network, params, tokens[:, 0], mask[:, 0], **options)
    found = mixture.beam_search(
        network, params, tokens[:, :1], mask[:, :1], np.zeros((4, 1)), **options
    )
    np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(found.log_probs[:, 0], greedy.log_probs, atol=1e-5)
    assert (greedy.tokens == 29).any()


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_those_of_a_slow_search(model, beams):
    prompts, log_weights = asked()
    free = search(model, prompts, log_weights, max_new_tokens=5).tokens[:, 0]
    stops = (int(free[0, 1]), int(free[1, 3]), int(free[2, 0]))
    options = {"beams": beams, "stop_tokens": stops, "pad_token": 29, "max_new_tokens": 5}
    found = search(model, prompts, log_weights, best=beams, **options)
    lengths = set()
    for i, (some, weights) in enumerate(zip(prompts, log_weights, strict=True)):
        expected = slow_beam(model, some, weights, beams, 5, stops)
        assert_found(found.tokens[i], found.log_probs[i], expected, pad=29)
        lengths |= {len(text) for _, text in expected}
    assert len(lengths) > 2
    first = search(model, prompts, log_weights, **options)
    np.testing.assert_array_equal(first.tokens, found.tokens[:, :1])


def test_enough_beams_find_the_best_of_all_texts(small):
    prompts, log_weights = asked(vocabulary=4, questions=2)
    stop, count = 1, 3
    texts = [
        text
        for n in range(1, count + 1)
        for text in itertools.product(range(4), repeat=n)
        if stop not in text[:-1] and (n == count or text[-1] == stop)
    ]
    assert len(texts) == 40
    options = {"beams": 64, "stop_tokens": (stop,), "max_new_tokens": count}
    found = search(small, prompts, log_weights, best=41, **options)
    for i, (some, weights) in enumerate(zip(prompts, log_weights, strict=True)):
        scored = [
            (sum(np.log(mixed(small, some, weights, y[:n])[y[n]]) for n in range(len(y))), y)
            for y in texts
        ]
        assert_found(found.tokens[i, :40], found.log_probs[i, :40], sorted(scored, reverse=True))
    assert np.isneginf(found.log_probs[:, 40]).all()  # there is no other


@pytest.mark.slow
def test_the_order_of_prompts_does_not_matter_and_equal_ones_are_one(model):
    prompts, log_weights = asked()
    options = {"beams": 3, "best": 3, "max_new_tokens": 6}
    found = search(model, prompts, log_weights, **options)
    order = [2, 0, 1]
    turned = search(
        model, [[p[z] for z in order] for p in prompts], log_weights[:, order], **options
    )
    np.testing.assert_array_equal(turned.tokens, found.tokens)
    np.testing.assert_allclose(turned.log_probs, found.log_probs, atol=1e-5)
    one = search(model, [p[:1] for p in prompts], np.zeros((4, 1)), **options)
    same = search(model, [p[:1] * K for p in prompts], np.full((4, K), -np.log(K)), **options)
    np.testing.assert_array_equal(same.tokens, one.tokens)
    np.testing.assert_allclose(same.log_probs, one.log_probs, atol=1e-5)
    silent = search(model, prompts, np.array([[0, -np.inf, -np.inf]] * 4), **options)
    np.testing.assert_array_equal(silent.tokens, one.tokens)


def counted(seen):
    """A decoder that adds to `seen` for every token it predicts."""

    class Counted(Decoder):
        def logits(self, hidden):
            jax.debug.callback(lambda: seen.append(len(hidden)))
            return super().logits(hidden)

    return Counted


@pytest.mark.slow
def test_ends_when_the_best_is_found_and_computes_nothing_after_it(model):
    network, params, adapters = model
    prompts, log_weights = asked()
    free = search(model, prompts, log_weights, max_new_tokens=4).tokens[:, 0]
    first, second = (tuple(map(int, free[:, i])) for i in range(2))

    def rows_predicted(**options):
        seen = []
        other = lora.add_lora(Network.of(counted(seen), network.config), network.lora)
        search((other, params, adapters), prompts, log_weights, max_new_tokens=7, **options)
        jax.effects_barrier()
        return seen

    assert rows_predicted() == [4 * K] * 7
    assert rows_predicted(stop_tokens=second) == [4 * K] * 2
    assert rows_predicted(stop_tokens=first, beams=3) == [4 * K]
    others_too = rows_predicted(stop_tokens=first, beams=3, best=3)
    assert others_too[:2] == [4 * K, 4 * 3 * K]


@pytest.mark.slow
def test_compiles_once_per_bucket_whatever_the_options(model):
    prompts, log_weights = asked()
    mixture._search.clear_cache()
    for count, best, stops in ((3, 1, (1,)), (8, 2, (2,)), (11, 1, (5,))):
        options = {"max_new_tokens": count, "best": best, "stop_tokens": stops}
        search(model, prompts, log_weights, beams=2, **options)
    assert mixture._search._cache_size() == 1
    search(model, prompts, log_weights, beams=2, stop_tokens=(1,), max_new_tokens=12)
    assert mixture._search._cache_size() == 2


def test_refuses_options_out_of_range(model):
    prompts, log_weights = asked()
    with pytest.raises(ConfigError, match="at least 1 and best at most beams, got 0, 1"):
        search(model, prompts, log_weights, beams=0)
    with pytest.raises(ConfigError, match="got 2, 3"):
        search(model, prompts, log_weights, beams=2, best=3)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        search(model, prompts, log_weights, max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"6 tokens and max_new_tokens=2043 .* 2048 positions"):
        search(model, prompts, log_weights, max_new_tokens=2043)
    network, params, _ = model
    tokens, mask = padded(prompts)
    with pytest.raises(ConfigError, match="on the left"):
        mixture.beam_search(network, params, tokens, mask[..., ::-1], log_weights)
