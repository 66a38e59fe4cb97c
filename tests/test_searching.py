"""Rollouts that search, against a loop that reads everything anew for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_tokenizer import tokenizer_of

from fedrag_jax.data.spelling import Spelling
from fedrag_jax.errors import ConfigError, NotFiniteError
from fedrag_jax.generation import decoding, searching
from fedrag_jax.generation.rollouts import BUDGET, TAGS, Budget, Part, Rollout, Tags
from fedrag_jax.generation.searching import roll_out
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network

pytestmark = pytest.mark.usefixtures("strict_types")

WORDS = ["[PAD]", "[EOS]", "[UNK]", *TAGS.search, *TAGS.answer, "<result>", "</result>"]
WORDS += [f"w{i}" for i in range(12)]
SPACED = TAGS._replace(found=" <result> {text} </result> ")
SMALL = Budget(turns=3, written=20, found=12)
EOS = 1
PROMPTS = [np.array(row, np.int32) for row in ([9, 10, 11, 12], [13], [14, 15], [9], [20, 9, 9])]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(WORDS)


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, max_positions=256,
    )  # fmt: skip
    network = Network.of(Decoder, config)
    return network, network.init(jax.random.key(0))


def found_for(query):
    """Of a length of its own, and full of tags."""
    count = 1 + sum(map(ord, query)) % 9
    return " ".join(["</answer>", "<search>", "w1", "</search>", *["w2"] * count])


def search(queries, numbers):
    return [found_for(query) for query in queries]


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, params, tokens, length):
    places = jnp.arange(tokens.shape[1])[None]
    hidden = network(params, tokens, places, places < length)
    return network(params, hidden[:, length - 1], method="logits")


def slow(network, params, tokenizer, prompt, row, key, budget=SMALL, tags=SPACED, temperature=1.0):
    """One rollout, every token from the whole of what is before it."""
    options = decoding.Options(
        np.array([EOS], np.int32), np.int32(0), np.float32(temperature), np.float32(1), key,
        np.array([row], np.int32),
    )  # fmt: skip
    tokens, parts, queries, texts, step = [*prompt], [], [], [], 0
    spelling = Spelling(tokenizer)
    head, tail = (spelling.whole(x) for x in tags.found.split("{text}"))
    while True:
        part, log_probs, finish = [], [], ""
        while not finish:
            padded = np.zeros((1, 160), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = _logits(network, params, padded, len(tokens))
            token, log_prob = decoding.choose(logits, True, options, jnp.int32(step))
            step += 1
            part.append(int(token[0]))
            log_probs.append(float(log_prob[0]))
            tokens.append(part[-1])
            text = " ".join(WORDS[t] for t in part if t != EOS)
            if part[-1] == EOS:
                finish = "stop"
            elif tags.answer[1] in text:
                finish = "answer"
            elif tags.search[1] in text:
                finish = "turns" if len(queries) == budget.turns else "search"
            elif len(part) == budget.written:
                finish = "length"
        parts.append((True, part, log_probs))
        texts.append(text)
        if finish != "search":
            return parts, queries, finish, texts
        before = text[: text.index(tags.search[1])]
        asked = before.rpartition(tags.search[0])[2] if tags.search[0] in before else ""
        queries.append(asked.strip())
        words = spelling.whole(found_for(queries[-1]))
        read = [*[*head, *words][: budget.found - len(tail)], *tail]
        parts.append((False, read, [0.0] * len(read)))
        tokens += read


def test_rollouts_are_those_of_a_loop_without_a_cache(model, tokenizer):
    key = jax.random.key(7)
    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,), "key": key}
    found = roll_out(*model, None, tokenizer, PROMPTS, search, **how)
    for row, (prompt, rollout) in enumerate(zip(PROMPTS, found, strict=True)):
        parts, queries, finish, texts = slow(*model, tokenizer, prompt, row, key)
        assert [p.written for p in rollout.parts] == [written for written, _, _ in parts]
        assert [p.tokens.tolist() for p in rollout.parts] == [tokens for _, tokens, _ in parts]
        for part, (_, _, log_probs) in zip(rollout.parts, parts, strict=True):
            np.testing.assert_allclose(part.log_probs, log_probs, atol=1e-5)
        assert (list(rollout.queries), rollout.finish, list(rollout.texts)) == (
            queries, finish, texts
        )  # fmt: skip
        np.testing.assert_array_equal(rollout.prompt, prompt)
    # It would prove little if none searched, or all ended alike.
    assert sum(len(r.queries) for r in found) > 3 and len({r.finish for r in found}) > 1


def test_a_rollout_does_not_depend_on_the_others(model, tokenizer):
    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,), "key": jax.random.key(3)}
    together = roll_out(*model, None, tokenizer, PROMPTS, search, **how)
    for row in (1, 4):
        (alone,) = roll_out(
            *model, None, tokenizer, PROMPTS[row : row + 1], search, rows=[row], **how
        )
        assert alone.texts == together[row].texts and alone.queries == together[row].queries


def test_all_that_wait_ask_in_one_call(model, tokenizer):
    calls = []

    def counted(queries, numbers):
        calls.append(queries)
        return search(queries, numbers)

    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,), "key": jax.random.key(7)}
    found = roll_out(*model, None, tokenizer, PROMPTS, counted, **how)
    asked = max(len(rollout.queries) for rollout in found)
    assert len(calls) == asked and sum(map(len, calls)) == sum(len(r.queries) for r in found)


def test_a_search_is_told_which_prompts_ask(model, tokenizer):
    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,), "key": jax.random.key(7)}

    def numbered(queries, numbers):
        return [f"w{number}" for number in numbers]

    rollouts = roll_out(*model, None, tokenizer, PROMPTS, numbered, **how)
    spelling = Spelling(tokenizer)
    head, tail = (spelling.whole(x) for x in SPACED.found.split("{text}"))
    found = [(n, p.tokens) for n, r in enumerate(rollouts) for p in r.parts if not p.written]
    for number, tokens in found:
        assert tokens.tolist() == [*head, *spelling.whole(f"w{number}"), *tail]
    assert len({number for number, _ in found}) > 1


def test_no_length_is_compiled_anew(model, tokenizer):
    programs = searching._write, searching._append
    for program in programs:
        program.clear_cache()
    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,)}
    for seed in range(12):
        roll_out(*model, None, tokenizer, PROMPTS, search, key=jax.random.key(seed), **how)
    # Of five, two or one row with room for all turns; before the first search of five with less room.
    counts = [program._cache_size() for program in programs]
    assert counts == [4, 3]


@pytest.mark.parametrize(
    ("waiting", "going"),
    [
        ([1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1, 0, 0, 1, 0, 1, 1], [1, 4, 6, 7]),
        ([0, 0, 0, 0, 0, 1, 0, 1], [5, 7]),
        ([0, 1, 0, 1, 0, 1, 0, 0], [0, 1, 3, 5]),
        ([0, 0, 1] + [0] * 29, [0, 1, 2, 3]),
        ([0, 0, 1], [2]),
        ([1], [0]),
    ],
)
def test_few_go_on_in_a_smaller_batch(waiting, going):
    np.testing.assert_array_equal(searching._fewer(np.array(waiting, bool)), going)


def test_the_likeliest_tokens_without_a_key(model, tokenizer):
    how = {"tags": SPACED, "budget": SMALL, "stop_tokens": (EOS,), "temperature": 0.0}
    first, again = (roll_out(*model, None, tokenizer, PROMPTS, search, **how) for _ in range(2))
    assert [r.texts for r in first] == [r.texts for r in again]
    assert roll_out(*model, None, tokenizer, [], search, **how) == []


def test_budgets_are_kept(model, tokenizer):
    key = jax.random.key(7)
    for budget in (Budget(0, 6, 4), Budget(1, 3, 8), Budget(2, 9, 5)):
        how = {"tags": SPACED, "budget": budget, "stop_tokens": (EOS,), "key": key}
        for rollout in roll_out(*model, None, tokenizer, PROMPTS * 4, search, **how):
            assert len(rollout.queries) <= budget.turns
            for part in rollout.parts:
                assert len(part.tokens) <= (budget.written if part.written else budget.found)
            if rollout.finish == "turns":
                assert len(rollout.queries) == budget.turns


def rollout(*texts, finish="answer"):
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    queries = tuple(text for text in texts[:-1])
    return Rollout(none[0], tuple(Part(True, *none) for _ in texts), queries, finish, texts)


@pytest.mark.parametrize(
    ("made", "answer", "well_formed"),
    [
        (rollout("I know. <answer> Rome </answer>"), "Rome", True),
        (rollout("<search>a</search>", "so <answer>Rome</answer>"), "Rome", True),
        (rollout("<search></search>", "<answer>Rome</answer>"), "Rome", False),
        (rollout("a</search>", "<answer>Rome</answer>"), "Rome", False),
        (rollout("<answer><search>a</search>", "<answer>Rome</answer>"), "Rome", False),
        (rollout("<search>a <answer>Rome</answer>"), "Rome", False),
        (rollout("Rome</answer>"), "", False),
        (rollout("<answer>Bern<answer>Rome</answer>"), "Rome", False),
        (rollout("<answer>Rome", finish="length"), "", False),
        (rollout("<search>a</search>", "<search>b</search>", finish="turns"), "", False),
    ],
)
def test_what_is_a_rollout_of_good_form(made, answer, well_formed):
    assert made.answer(TAGS) == answer
    assert made.well_formed(TAGS) == well_formed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "temperature 1 draws tokens at random: give a key"),
        ({"temperature": 0.0, "budget": Budget(-1)}, "turns >= 0 and found >= 1"),
        ({"temperature": 0.0, "budget": Budget(2, 8, 0)}, "turns >= 0 and found >= 1"),
        ({"temperature": 0.0, "budget": Budget(9, 64, 64)}, r"more than the model's 256 positions"),
        ({"temperature": 0.0, "budget": Budget(1, 0, 8)}, "max_new_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(model, tokenizer, how, message):
    with pytest.raises(ConfigError, match=message):
        roll_out(*model, None, tokenizer, PROMPTS, search, **how)


def test_a_window_that_rollouts_outgrow_is_refused(model, tokenizer):
    network, params = model

    narrow = Network.of(Decoder, dataclasses.replace(network.config, windows=(16, 0)))
    with pytest.raises(ConfigError, match="some layers attend to only 16 tokens"):
        roll_out(narrow, params, None, tokenizer, PROMPTS, search, temperature=0.0, budget=SMALL)


def test_what_is_no_number_is_an_error(model, tokenizer):
    network, params = model
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(NotFiniteError):
        roll_out(network, broken, None, tokenizer, PROMPTS, search, temperature=0.0, budget=SMALL)


def test_tags_are_a_setting():
    other = Tags(search=("[", "]"), answer=("(", ")"))
    assert rollout("[a]", "(Rome)").well_formed(other)
    assert BUDGET.turns == 4
