"""Prompts that share a row of tokens: the likelihoods of rows of their own, with less padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rag import EXAMPLES, PASSAGES, TOKENIZER

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Passage
from fedrag_jax.data.prompts import COMPACT
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.generator import ralt
from fedrag_jax.tracking.ledger import step_flops

pytestmark = pytest.mark.usefixtures("strict_types")

CONFIG = DecoderConfig(
    vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=4,
)  # fmt: skip
KINDS = {
    "plain": {},
    "sliding windows, grouped queries": {"windows": (7, 0), "num_kv_heads": 2},
    "normalised queries and keys": {"qk_norm": True, "qkv_bias": True},
}
ROWS = np.array([[0, 1, 2], [2, 1, 0], [1, 0, 3], [3, 2, 1]])


def decoder_of(**changes):
    """A random decoder whose adapters and attention do something."""
    network = Network.of(Decoder, dataclasses.replace(CONFIG, **changes))
    params = network.init(jax.random.key(1))
    params["embed"]["embedding"] *= 50  # rows of length one and more, which attention tells apart
    network = add_lora(network, LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj")))
    return network, params, jax.tree.map(lambda x: x + 0.05, init_adapters(network, 3))


def task_of(packed, *network, passages=PASSAGES):
    prompts = Prompts(TOKENIZER, COMPACT, passages, EXAMPLES)
    return ralt(*network, prompts, lambda examples: ROWS[: len(examples)], packed=packed)


def batch_of(task):
    return task.collate(EXAMPLES, None) | {"weight": np.array([1, 1, 0.5, 1], np.float32)}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_rows_of_their_own(kind):
    found = []
    for packed in (False, True):
        task = task_of(packed, *decoder_of(**KINDS[kind]))
        step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        found.append(step(task.trainable, task.frozen, batch_of(task), jax.random.key(0)))
    (apart, slopes), (packed, packed_slopes) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart, packed)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(slopes))
    assert largest > 1e-2
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(packed_slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_a_row_holds_the_prompts_one_after_another():
    apart, packed = (task_of(p, None, None, None).collate(EXAMPLES, None) for p in (False, True))
    assert packed["tokens"].shape[:2] == (4, 1)
    for i in range(4):
        row, segments = packed["tokens"][i, 0], packed["segments"][i, 0]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for j in range(3):
            alone = apart["tokens"][i, j, : apart["lengths"][i, j]]
            np.testing.assert_array_equal(row[segments == j + 1], alone)
            scored = packed["answer_mask"][i] > 0
            np.testing.assert_array_equal(
                row[packed["answer_positions"][i, j][scored]],
                apart["tokens"][i, j][apart["answer_positions"][i, j][scored]],
            )
    np.testing.assert_array_equal(apart["lengths"], packed["lengths"])


def test_positions_start_again_in_each_prompt():
    """Attention sees differences of positions alone, so that only a look at them can tell."""
    network, *arrays = decoder_of()
    seen = []

    def watched(params, tokens, *inputs, **options):
        seen.append(inputs)
        return network(params, tokens, *inputs, **options)

    table = task_of(True, network, *arrays).collate(EXAMPLES[:1], None)
    answer_log_probs(watched, *arrays, table)
    positions, mask = seen[0]
    lengths = table["lengths"][0]
    np.testing.assert_array_equal(positions[mask], np.concatenate([np.arange(n) for n in lengths]))


def test_passages_of_different_lengths_take_less_room_packed():
    """One passage of ten times the usual length sets the width of rows of their own."""
    long = [*PASSAGES * 5, Passage("long", "", "Words. " * 40)]
    prompts = Prompts(TOKENIZER, COMPACT, long, EXAMPLES)
    apart = prompts.training_table(EXAMPLES, ROWS, per_passage=True)
    packed = prompts.training_table(EXAMPLES, ROWS, per_passage=True, packed=True)
    assert packed["tokens"].size < 0.5 * apart["tokens"].size
    np.testing.assert_array_equal(apart["lengths"], packed["lengths"])
    # Where it does come, it is cut, and nothing else.
    table = prompts.training_table(EXAMPLES, [[0, 20, 1]] * 4, per_passage=True, packed=True)
    for i, example in enumerate(EXAMPLES):
        row, segments = table["tokens"][i, 0], table["segments"][i, 0]
        tail = [
            *prompts.question_tokens(example.question),
            *prompts.answer_tokens(example.answers[0]),
        ]
        for j in range(3):
            np.testing.assert_array_equal(row[segments == j + 1][-len(tail) :], tail)
        first = prompts.prompt(example.question, [0])
        np.testing.assert_array_equal(row[: len(first)], first)
    assert (table["segments"][:, 0] > 0).sum(1).max() <= prompts.training_width(1, packed=3)


def test_one_prompt_packed_is_one_prompt():
    prompts = Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES)
    tables = [
        prompts.training_table(EXAMPLES, ROWS[:, :1], per_passage=True, packed=packed)
        for packed in (False, True)
    ]
    for name, column in tables[0].items():
        np.testing.assert_array_equal(column, tables[1][name])


def test_operations_are_counted_for_the_row_that_is_computed():
    network = decoder_of()
    apart, packed = (task_of(p, *network) for p in (False, True))
    tables = [task.collate(EXAMPLES, None) for task in (apart, packed)]
    padded = [t["tokens"][0].size for t in tables]
    counts = [step_flops(task, t, 1) for task, t in zip((apart, packed), tables, strict=True)]
    # Every token of the row looks at three times as many, in a decoder where that weighs as much.
    assert counts[0] * padded[1] / padded[0] < counts[1] < 3 * counts[0]


def test_segments_are_not_continued_from_a_cache():
    network, params, _ = decoder_of()
    tokens = jnp.ones((1, 4), int)
    _, cache = network(params, tokens, tokens, tokens, room=8)
    with pytest.raises(ConfigError, match="leave the cache out"):
        network(params, tokens, tokens, tokens, cache, segments=tokens)
