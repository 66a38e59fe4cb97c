"""Greedy decoding against a loop without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.errors import ConfigError
from fedrag_jax.models import decoding, lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network

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
    written = decoding.greedy(network, params, tokens, mask, max_new_tokens=8)
    assert written.shape == (3, 8)
    assert written.dtype == jnp.int32
    expected = [slow_greedy(network, params, row, 8) for row in ROWS]
    np.testing.assert_array_equal(written, expected)
    assert len(np.unique(written)) > 5  # a model that repeats itself would prove little
    alone = decoding.greedy(network, params, *left_padded(ROWS[1:2], 1), max_new_tokens=8)
    np.testing.assert_array_equal(alone[0], expected[1])


def test_adapters_take_part(model):
    base, params = model
    network = lora.add_lora(base, lora.LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.3, lora.init_adapters(network, 0))
    written = decoding.greedy(
        network, params, *left_padded(ROWS), adapters=adapters, max_new_tokens=6
    )
    expected = [slow_greedy(network, params, row, 6, adapters) for row in ROWS]
    np.testing.assert_array_equal(written, expected)
    assert not np.array_equal(expected, [slow_greedy(base, params, row, 6) for row in ROWS])


def test_rows_end_with_the_first_stop_token(model):
    network, params = model
    free = np.asarray(decoding.greedy(network, params, *left_padded(ROWS), max_new_tokens=8))
    stops = (int(free[0, 2]), int(free[1, 4]))
    written = decoding.greedy(
        network, params, *left_padded(ROWS), max_new_tokens=8, stop_tokens=stops, pad_token=49
    )
    for row, full in zip(np.asarray(written), free, strict=True):
        ends = np.flatnonzero(np.isin(full, stops))
        end = ends[0] + 1 if ends.size else 8
        np.testing.assert_array_equal(row[:end], full[:end])
        assert (row[end:] == 49).all()
    assert (written[0, 3:] == 49).all()


def test_compiles_once_per_shape_whatever_the_stop_tokens(model):
    network, params = model
    decoding._greedy.clear_cache()
    for rows, stops, pad in ((ROWS, (1,), 0), (ROWS[::-1], (2,), 3)):
        decoding.greedy(
            network, params, *left_padded(rows), stop_tokens=stops, pad_token=pad, max_new_tokens=3
        )
    assert decoding._greedy._cache_size() == 1
    decoding.greedy(network, params, *left_padded(ROWS, 6), stop_tokens=(1,), max_new_tokens=3)
    assert decoding._greedy._cache_size() == 2


def test_ends_early_when_every_row_has_stopped(model):
    """Counts the steps taken by the loop of the compiled program, through a callback per step."""
    network, params = model
    seen = []

    class Counted(Decoder):
        def logits(self, hidden):
            jax.debug.callback(lambda: seen.append(1))
            return super().logits(hidden)

    counted = Network.of(Counted, CONFIG)
    first = np.asarray(decoding.greedy(network, params, *left_padded(ROWS), max_new_tokens=1))
    stops = tuple(map(int, first[:, 0]))
    decoding.greedy(counted, params, *left_padded(ROWS), stop_tokens=stops, max_new_tokens=9)
    jax.effects_barrier()
    assert len(seen) == 2  # the prompt, and the step that wrote the stop tokens


def test_refuses_right_padding_and_no_tokens(model):
    network, params = model
    tokens, mask = left_padded(ROWS)
    with pytest.raises(ConfigError, match="on the left"):
        decoding.greedy(network, params, tokens[:, ::-1], mask[:, ::-1])
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        decoding.greedy(network, params, tokens, mask, max_new_tokens=0)
