"""Decoding against a loop without a cache, and draws against their distribution."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import decoding, likelihood
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network

pytestmark = pytest.mark.usefixtures("strict_types")

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
ROWS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


@pytest.fixture(scope="module")
def model():
    network = Network.of(Decoder, CONFIG)
    params = network.init(jax.random.key(0))
    params["embed"]["embedding"] = jax.random.normal(jax.random.key(1), (50, 16))
    return network, params


def left_padded(rows, width=5):
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return tokens, mask


def slow_greedy(network, params, row, count, adapters=None):
    """One row, everything computed anew for every token; padded on the right to one shape."""

    row = list(row)
    for _ in range(count):
        tokens = jnp.array([row + [0] * (20 - len(row))])
        row.append(int(next_token(network, params, adapters, tokens, len(row))))
    return row[-count:]


@functools.partial(jax.jit, static_argnums=0)
def next_token(network, params, adapters, tokens, length):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = network(params, tokens, positions, positions < length, adapters=adapters)
    return network(params, hidden[0, length - 1], method="logits", adapters=adapters).argmax()


def test_batched_with_a_cache_equals_row_by_row_without(model):
    network, params = model
    tokens, mask = left_padded(ROWS)
    written = decoding.generate(network, params, tokens, mask, max_new_tokens=8).tokens
    assert written.shape == (3, 8)
    assert written.dtype == jnp.int32
    expected = [slow_greedy(network, params, row, 8) for row in ROWS]
    np.testing.assert_array_equal(written, expected)
    assert len(np.unique(written)) > 5  # a model that repeats itself would prove little
    alone = decoding.generate(network, params, *left_padded(ROWS[1:2], 1), max_new_tokens=8)
    np.testing.assert_array_equal(alone.tokens[0], expected[1])


def test_adapters_take_part(model):
    base, params = model
    network = lora.add_lora(base, lora.LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.3, lora.init_adapters(network, 0))
    written = decoding.generate(
        network, params, *left_padded(ROWS), adapters=adapters, max_new_tokens=6
    ).tokens
    expected = [slow_greedy(network, params, row, 6, adapters) for row in ROWS]
    np.testing.assert_array_equal(written, expected)
    assert not np.array_equal(expected, [slow_greedy(base, params, row, 6) for row in ROWS])


def test_rows_end_with_the_first_stop_token(model):
    network, params = model
    free = decoding.generate(network, params, *left_padded(ROWS), max_new_tokens=8)
    stops = (int(free.tokens[0, 2]), int(free.tokens[1, 4]))
    written = decoding.generate(
        network, params, *left_padded(ROWS), max_new_tokens=8, stop_tokens=stops, pad_token=49
    )
    assert written.tokens.shape == written.log_probs.shape == (3, 8)
    for row in range(3):
        ends = np.flatnonzero(np.isin(free.tokens[row], stops))
        end = ends[0] + 1 if ends.size else 8
        np.testing.assert_array_equal(written.tokens[row, :end], free.tokens[row, :end])
        np.testing.assert_array_equal(written.log_probs[row, :end], free.log_probs[row, :end])
        assert (written.tokens[row, end:] == 49).all()
        assert (written.log_probs[row, end:] == 0).all()
    assert (written.tokens[0, 3:] == 49).all()


@pytest.mark.slow
def test_compiles_once_per_bucket_whatever_the_options(model):
    network, params = model
    decoding._begin.clear_cache(), decoding._advance.clear_cache()
    key = jax.random.key(0)
    for rows, stops, pad, count, every in (
        (ROWS, (1,), 0, 3, 16),
        (ROWS[::-1], (2,), 3, 11, 16),
        (ROWS, (2,), 3, 12, 5),
    ):
        options = {"stop_tokens": stops, "pad_token": pad, "max_new_tokens": count, "every": every}
        list(decoding.pieces(network, params, *left_padded(rows), **options))
    sizes = decoding._begin._cache_size, decoding._advance._cache_size
    assert [size() for size in sizes] == [1, 1]
    for temperature, top_p, count in ((0.5, 1.0, 4), (1.5, 0.9, 9), (1.0, 0.2, 12)):
        decoding.generate(
            network,
            params,
            *left_padded(ROWS),
            stop_tokens=(1,),
            max_new_tokens=count,
            temperature=temperature,
            top_p=top_p,
            key=key,
        )
    assert [size() for size in sizes] == [2, 2]  # drawing is another program than the likeliest
    decoding.generate(network, params, *left_padded(ROWS), stop_tokens=(1,), max_new_tokens=13)
    assert [size() for size in sizes] == [3, 3]


def test_buckets_are_few_and_near():
    lengths = np.arange(1, 5000)
    sizes = np.array([decoding.bucket(int(n)) for n in lengths])
    assert (sizes >= lengths).all()
    assert (np.diff(sizes) >= 0).all()
    assert len(set(sizes)) < 60
    assert (sizes - lengths < np.maximum(32, lengths / 8 + 1)).all()
    assert decoding.bucket(17, 16) == 32
    assert [decoding.bucket(n) for n in (512, 513, 1025)] == [512, 576, 1152]


def counted(seen):
    """A decoder that adds to `seen` for every step of the compiled programs."""

    class Counted(Decoder):
        def logits(self, hidden):
            jax.debug.callback(lambda: seen.append(1))
            return super().logits(hidden)

    return Network.of(Counted, CONFIG)


def test_ends_early_when_every_row_has_stopped(model):
    network, params = model
    seen = []
    first = decoding.generate(network, params, *left_padded(ROWS), max_new_tokens=4).tokens
    stops = tuple(map(int, first[:, 2]))
    ends = [np.flatnonzero(np.isin(row, stops))[0] for row in first]
    decoding.generate(
        counted(seen), params, *left_padded(ROWS), stop_tokens=stops, max_new_tokens=30
    )
    jax.effects_barrier()
    assert len(seen) == max(ends) + 1


def test_computes_nothing_after_the_last_token(model):
    _, params = model
    for count in (1, 5, 18):
        seen = []
        decoding.generate(counted(seen), params, *left_padded(ROWS), max_new_tokens=count)
        jax.effects_barrier()
        assert len(seen) == count


def test_refuses_options_out_of_range(model):
    network, params = model
    tokens, mask = left_padded(ROWS)

    def generate(**options):
        decoding.generate(network, params, *left_padded(ROWS), **options)

    with pytest.raises(ConfigError, match="on the left"):
        decoding.generate(network, params, tokens[:, ::-1], mask[:, ::-1])
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        generate(max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"or at least 0\.001, got -0\.5"):
        generate(temperature=-0.5)
    with pytest.raises(ConfigError, match=r"at least 0\.001, got nan"):
        generate(temperature=float("nan"))
    for top_p in (0.0, 1.1):
        with pytest.raises(ConfigError, match=f"at most 1 .*, got {top_p}"):
            generate(top_p=top_p)
    with pytest.raises(ConfigError, match="give a key"):
        generate(temperature=1.0)
    generate(max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"5 tokens and max_new_tokens=2044 .* 2048 positions"):
        generate(max_new_tokens=2044)


# --- drawn at random ------------------------------------------------------------------------------


def draw(model, prompts, width=5, **options):
    network, params = model
    settings = {"temperature": 0.9, "key": jax.random.key(3), "max_new_tokens": 7} | options
    return decoding.generate(network, params, *left_padded(prompts, width), **settings)


@pytest.mark.slow
def test_draws_depend_on_key_row_and_step_alone(model):
    written = draw(model, ROWS).tokens
    np.testing.assert_array_equal(draw(model, ROWS).tokens, written)
    np.testing.assert_array_equal(draw(model, ROWS, 9).tokens, written)  # more padding
    np.testing.assert_array_equal(draw(model, ROWS[1:], rows=[1, 2]).tokens, written[1:])
    np.testing.assert_array_equal(draw(model, ROWS, max_new_tokens=20).tokens[:, :7], written)
    assert not np.array_equal(draw(model, ROWS, key=jax.random.key(4)).tokens, written)
    same = draw(model, [ROWS[0]] * 3).tokens
    assert len(np.unique(same, axis=0)) == 3
    assert len({tuple(column) for column in same.T}) > 1


def test_cached_draws_equal_draws_without_a_cache(model):
    """The same noise on logits computed anew for every token."""
    network, params = model
    key = jax.random.key(3)
    written = draw(model, ROWS).tokens
    for number, row in enumerate(ROWS):
        row = list(row)
        for step in range(7):
            scores = all_logits(network, params, row)[len(row) - 1] / 0.9
            noise = jax.random.fold_in(jax.random.fold_in(key, number), step)
            row.append(int((scores + jax.random.gumbel(noise, (50,))).argmax()))
        np.testing.assert_array_equal(written[number], row[-7:])


def all_logits(network, params, row):
    """[T, V], without a cache."""
    return _all_logits(network, params, jnp.array([row + [0] * (20 - len(row))]))[0]


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(network, params, tokens):
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(params, tokens, index, jnp.ones_like(tokens))
    return network(params, hidden, method="logits")


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.6, "top_p": 0.6}]
)
def test_log_probs_equal_those_of_teacher_forcing(model, options):
    network, params = model
    written = draw(model, ROWS, **options)
    lengths = np.array([len(row) for row in ROWS])
    whole = np.zeros((3, 12), np.int32)
    for row, prompt, new in zip(whole, ROWS, written.tokens, strict=True):
        row[: len(prompt) + 7] = [*prompt, *new]
    batch = {
        "tokens": whole[:, None],
        "lengths": lengths[:, None] + 7,
        "answer_positions": (lengths[:, None] + np.arange(7))[:, None],
    }
    expected = likelihood.answer_log_probs(network, params, None, batch)[:, 0]
    np.testing.assert_allclose(written.log_probs, expected, atol=2e-5)
    assert written.log_probs.dtype == np.float32
    assert written.log_probs.std() > 0.1


def slow_nucleus(probs, top_p):
    kept, mass = np.zeros(len(probs), bool), 0.0
    for token in np.argsort(-probs, kind="stable"):
        if mass >= top_p:
            break
        kept[token], mass = True, mass + probs[token]
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 40)) * rng.uniform(0.1, 8, (30, 1))
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    kept = jax.jit(decoding.nucleus)(jnp.array(scores, jnp.float32), jnp.float32(top_p))
    np.testing.assert_array_equal(kept, [slow_nucleus(p, top_p) for p in probs])
    assert kept.any(-1).all()


def test_top_p_among_equals_and_the_certain():
    scores = jnp.array([[0.0, 0, 0, 0], [0, 30, 0, 0], [0, 9, 9, 9], [-jnp.inf, 5, 5, -jnp.inf]])
    kept = decoding.nucleus(scores, jnp.float32(0.5)).astype(int)
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("options", [(0.8, 1.0), (1.3, 0.7), (0.5, 0.3)])
def test_frequencies_are_those_of_the_distribution(model, options):
    """Chi-squared, of the first token after one prompt and of the second after the likeliest first."""
    network, params = model
    temperature, top_p = options
    count = 4000
    written = draw(
        model, [ROWS[2]] * count, 3, temperature=temperature, top_p=top_p, max_new_tokens=2
    ).tokens
    likeliest = np.bincount(written[:, 0]).argmax()
    for prompt, drawn in (
        (ROWS[2], written[:, 0]),
        ([*ROWS[2], int(likeliest)], written[written[:, 0] == likeliest, 1]),
    ):
        scores = np.asarray(all_logits(network, params, prompt)[len(prompt) - 1], float)
        probs = np.exp(scores / temperature)
        probs /= probs.sum()
        probs = np.where(slow_nucleus(probs, top_p), probs, 0)
        probs /= probs.sum()
        found = np.bincount(drawn, minlength=50)
        assert (found[probs == 0] == 0).all()
        often = probs * len(drawn) >= 5
        found = [*found[often], found[~often].sum()]
        expected = np.array([*probs[often], probs[~often].sum()]) * len(drawn)
        known = expected > 0
        if known.sum() > 1:  # else what was drawn is certain
            assert scipy.stats.chisquare(np.array(found)[known], expected[known]).pvalue > 1e-3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on a CPU")
def test_writing_a_token_copies_no_cache(model):
    network, params = model
    tokens, mask = np.ones((2, 8), np.int32), np.ones((2, 8), bool)
    zero = np.int32(0)
    options = decoding.Options(
        np.array([], np.int32),
        zero,
        np.float32(0),
        np.float32(1),
        None,
        np.arange(2, dtype=np.int32),
    )
    state, *_ = decoding._begin(network, False, 32, params, None, tokens, mask, options)
    params, _ = decoding.token_weights(params, None)
    cache = decoding.token_cache(state.cache)
    state = state._replace(cache=cache)
    lowered = decoding._advance.lower(network, False, state, params, None, np.int32(4), options)
    shape = ",".join(map(str, cache.keys.layers[0].shape))
    inside = lowered.compile().as_text().split("ENTRY")[0]
    assert f"f32[{shape}]" in inside
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", inside)
