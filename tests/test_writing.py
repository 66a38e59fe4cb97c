"""Texts: where they end, that streaming gives the same, and that lengths do not compile anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.prompts import COMPACT, COMPACT_REASONED, INSTRUCT
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import decoding
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.models import hub
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.layers import take_rows
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem

LINES = [
    "The archive of Ostrava was opened",
    "Who",
    "A painter from the north, born in the year of",
]


@pytest.fixture(scope="module")
def model():
    return hub.load("builtin:decoder")


@pytest.fixture(scope="module")
def writer(model):
    return Writer(model.network, model.params, model.tokenizer, (model.tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def prompts(model):
    rows = model.tokenizer(LINES, add_special_tokens=False)["input_ids"]
    return [np.array(row, np.int32) for row in rows]


def scripted(model, text, after=1):
    """A writer that writes these words after any prompt of a given length, then its stop token."""
    script = [5] * (after - 1)
    script += [*model.tokenizer(text, add_special_tokens=False)["input_ids"], 2, *[5] * 50]
    size = model.network.config.vocab_size

    class Scripted(Decoder):
        def __call__(self, tokens, positions, mask, cache=None, read=None, room=0):
            _, cache = super().__call__(tokens, positions, mask, cache, read, room=room)
            return jax.nn.one_hot(jnp.array(script)[take_rows(positions, read)], size), cache

        def logits(self, hidden):
            return 20 * hidden

    config = DecoderConfig(size, 8, 8, 1, 1, 1, 8)
    network = Network.of(Scripted, config)
    return Writer(network, network.init(jax.random.key(0)), model.tokenizer, (2,))


def test_chunks_share_one_copy_of_the_weights(writer, prompts, monkeypatch):
    copies, copied = [], decoding.token_weights

    def counted(params, adapters):
        copies.append(copied(params, adapters))
        return copies[-1]

    monkeypatch.setattr(decoding, "token_weights", counted)
    sampling = Sampling(max_new_tokens=3)
    together = writer.complete(prompts * 12, sampling)  # four chunks
    assert len(copies) == 1
    assert [text.text for text in together[:3]] == [
        text.text for prompt in prompts for text in writer.complete([prompt], sampling)
    ]


ONE = np.array([7], np.int32)
TEXT = "Der Müller aß crème brûlée — 日本の菓子 🎉🎊 und ging. Then nobody came."


@pytest.mark.parametrize("every", [1, 3, 16])
def test_characters_are_never_broken(model, every):
    writer = scripted(model, TEXT)
    (whole,) = writer.complete([ONE], Sampling(max_new_tokens=200))
    assert (whole.text, whole.finish) == (TEXT, "stop")
    assert whole.tokens[-1] == 2
    assert len(whole.tokens) == len(whole.log_probs)
    pieces = list(writer.stream(ONE, Sampling(max_new_tokens=200), every))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > len(whole.tokens) / every / 4


def test_a_limit_within_a_character_leaves_no_half_of_it(model):
    writer = scripted(model, TEXT)
    tokens = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    texts = [model.tokenizer.decode(tokens[:n]) for n in range(len(tokens))]
    halves = [n for n, text in enumerate(texts) if text.endswith("\ufffd")]
    assert len(halves) > 3
    for count in halves:
        sampling = Sampling(max_new_tokens=count)
        (whole,) = writer.complete([ONE], sampling)
        (found,) = writer.search([[ONE]], np.zeros((1, 1)), sampling=sampling)
        assert (whole.text, whole.finish) == (texts[count].rstrip("\ufffd"), "length")
        assert TEXT.startswith(whole.text) and len(whole.tokens) == count
        assert found[0].text == "".join(writer.stream(ONE, sampling)) == whole.text


LINES_WRITTEN = "\n\nParis is\nthe capital.\n"


@pytest.mark.parametrize(
    ("style", "answer"),
    [(INSTRUCT, LINES_WRITTEN.strip()), (COMPACT, ""), (INSTRUCT._replace(one_line=True), "")],
)
def test_answers_go_over_lines_but_where_a_table_counts_them(model, style, answer):
    system = RAGSystem.build(
        [Passage("p", "", "Some text.")], generator=model, prompt_style=style, top_k=1
    )
    asked = len(system.prompts.prompt("Where?", [0]))
    wrote = scripted(model, LINES_WRITTEN, after=asked)
    generator = dataclasses.replace(model, params=wrote.params)
    system = dataclasses.replace(system, decoder=wrote.network, generator=generator, adapters=None)
    assert system.answer(["Where?"], [[0]]) == [answer]
    assert "".join(system.stream("Where?", [0])) == answer
    assert system.prompts.max_answer_tokens == (256 if answer else 16)


@pytest.mark.parametrize("given", [(), ("never",), (" in",)])
def test_an_answer_ends_before_a_question_that_the_generator_asks_itself(model, given):
    system = RAGSystem.build(
        [Passage("p", "", "Some text.")], generator=model, prompt_style=INSTRUCT, top_k=1
    )
    asked = len(system.prompts.prompt("Where?", [0]))
    wrote = scripted(model, "It is in London.\n\n### Question:\nWho lives there?", after=asked)
    generator = dataclasses.replace(model, params=wrote.params)
    system = dataclasses.replace(system, decoder=wrote.network, generator=generator, adapters=None)
    (reading,) = system.read(["Where?"], [[0]], stop=given)
    expected = "It is" if " in" in given else "It is in London."
    assert (reading.answer, reading.finish) == (expected, "stop")
    assert "".join(system.stream("Where?", [0], stop=given)).strip() == expected


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize(
    "stop",
    [("ging",), ("🎊 u", "nobody"), ("nobody", "Then"), (".",), ("came.",), ("zebra", "日本")],
)
def test_texts_end_before_the_first_stop_string(model, stop, every):
    """Most of these are parts of several tokens."""
    writer, sampling = scripted(model, TEXT), Sampling(max_new_tokens=200, stop=stop)
    expected = TEXT[: min(TEXT.find(s) for s in stop if s in TEXT)]
    (whole,) = writer.complete([ONE], sampling)
    assert (whole.text, whole.finish) == (expected, "stop")
    assert "".join(writer.stream(ONE, sampling, every)) == expected
    read = model.tokenizer.decode(whole.tokens)
    assert any(s in read for s in stop)
    assert not any(s in model.tokenizer.decode(whole.tokens[:-1]) for s in stop)
    assert len(whole.log_probs) == len(whole.tokens)


def test_what_could_begin_a_stop_string_is_sent_when_it_does_not(model):
    sampling = Sampling(max_new_tokens=200, stop=("came!", "und gehen"))
    assert "".join(scripted(model, TEXT).stream(ONE, sampling, 1)) == TEXT
    (whole,) = scripted(model, TEXT).complete([ONE], sampling)
    assert (whole.text, whole.finish) == (TEXT, "stop")


CIRCLE = "The server is a server that is made of servers and of silos. "


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize(
    ("text", "expected", "finish"),
    [
        ("First. " + CIRCLE * 5, "First. " + CIRCLE.strip(), "repetition"),
        (CIRCLE * 2 + "Then it went on.", CIRCLE * 2 + "Then it went on.", "stop"),
        (
            "| a | b | c | d |\n|---|---|---|---|\n",
            "| a | b | c | d |\n|---|---|---|---|\n",
            "stop",
        ),
        ("no, " * 40, "no, no, no", "repetition"),
    ],
)
def test_texts_that_go_round_in_circles_end(model, text, expected, finish, every):
    sampling = Sampling(max_new_tokens=250)
    writer = scripted(model, text)
    (whole,) = writer.complete([ONE], sampling)
    assert whole.finish == finish
    assert whole.text.strip() == expected.strip()
    assert "".join(writer.stream(ONE, sampling, every)) == whole.text
    assert len(whole.tokens) == len(whole.log_probs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_adds_up_to_the_completion(writer, prompts, temperature):
    sampling = Sampling(max_new_tokens=30, temperature=temperature, seed=5)
    for prompt in prompts:
        (whole,) = writer.complete([prompt], sampling)
        assert len(whole.text) > 10
        assert "".join(writer.stream(prompt, sampling)) == whole.text
        middle = whole.text[len(whole.text) // 2 :][:4]
        stopped = dataclasses.replace(sampling, stop=(middle,))
        (cut,) = writer.complete([prompt], stopped)
        assert (cut.text, cut.finish) == (whole.text[: whole.text.find(middle)], "stop")
        assert "".join(writer.stream(prompt, stopped, 3)) == cut.text


@pytest.mark.slow
def test_a_prompt_is_continued_alike_alone_and_among_others(writer, prompts):
    """In chunks of another size, with more padding, in another order."""
    sampling = Sampling(max_new_tokens=20)
    many = [*prompts, np.tile(prompts[2], 9), *prompts[::-1]] * 2
    found = writer.complete(many, sampling)
    assert [c.text for c in found[:7]] == [c.text for c in found[7:]]
    for prompt, completion in zip(many[:4], found[:4], strict=True):
        (alone,) = writer.complete([prompt], sampling)
        assert alone.text == completion.text
        np.testing.assert_array_equal(alone.tokens, completion.tokens)
        np.testing.assert_allclose(alone.log_probs, completion.log_probs, atol=1e-4)
    assert writer.complete([], sampling) == []


@pytest.mark.slow
def test_the_nth_prompt_draws_alike_whatever_the_others(writer, prompts):
    sampling = Sampling(max_new_tokens=12, temperature=1.2, top_p=0.95, seed=1)
    found = writer.complete([prompts[0]] * 12, sampling)
    assert len({c.text for c in found}) > 6
    other = writer.complete([prompts[2], *[prompts[0]] * 2], sampling)
    assert [c.text for c in other[1:]] == [c.text for c in found[1:3]]
    again = writer.complete([prompts[0]] * 2, dataclasses.replace(sampling, seed=2))
    assert [c.text for c in again] != [c.text for c in found[:2]]


@pytest.mark.slow
def test_lengths_of_one_bucket_share_their_programs(writer):
    """Whatever the lengths of prompts and texts, counted by the compiler's own events."""
    writer = dataclasses.replace(writer, stop_tokens=())  # each writes as much as it may
    compiled = []

    def listen(event, _, **__):
        compiled.append(event) if event.endswith("backend_compile_duration") else None

    def write(length, count, **options):
        prompt = np.arange(5, 5 + length, dtype=np.int32)
        sampling = Sampling(max_new_tokens=count, **options)
        writer.complete([prompt], sampling)
        list(writer.stream(prompt, sampling))

    write(33, 20), write(33, 20, temperature=0.5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length, count in ((34, 18), (40, 33), (57, 18), (64, 24), (64, 33), (50, 19)):
            write(length, count)
            write(length, count, temperature=1 + length / 100, top_p=count / 50, stop=("zebra",))
        assert not compiled
        write(65, 20)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_refusals(writer, prompts):
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature must be 0 .* got -1\.0"),
        ({"top_p": 0.0}, r"top_p must be above 0 .* got 0\.0"),
        ({"top_p": 1.5}, r"got 1\.5"),
        ({"stop": ("end", "")}, r"not empty, got \('end', ''\)"),
        ({"stop": "end"}, "must be a sequence of strings .* got 'end'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sampling(**options)
    with pytest.raises(ConfigError, match="2048 positions: shorten"):
        writer.complete([np.zeros(2040, np.int32)])
    with pytest.raises(ConfigError, match="every must be between 1 and 16, got 17"):
        next(writer.stream(prompts[0], every=17))


# --- answers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system():
    texts = [f"The harbour of Port {name} was built by {name}son." for name in ("Ada", "Bo", "Cy")]
    passages = [Passage(id=str(i), title="Harbour", text=text) for i, text in enumerate(texts)]
    return RAGSystem.build(passages, top_k=2)


def test_a_streamed_answer_is_the_answer(system):
    question = "Who built the harbour of Port Bo?"
    for options in ({}, {"temperature": 1.5, "seed": 3, "max_new_tokens": 40}):
        answer = system.query(question, **options).answer
        assert answer
        assert "".join(system.stream(question, **options)) == answer


@pytest.mark.slow
def test_answers_take_options(system):
    questions = ["Who built the harbour of Port Bo?"] * 8
    assert len({r.answer for r in system.batch_query(questions)}) == 1
    drawn = [r.answer for r in system.batch_query(questions, temperature=3.0)]
    assert len(set(drawn)) > 3
    assert [r.answer for r in system.batch_query(questions, temperature=3.0)] == drawn
    assert [r.answer for r in system.batch_query(questions, temperature=3.0, seed=1)] != drawn
    whole = system.query(questions[0]).answer
    assert system.query(questions[0], stop=(whole[2:4],)).answer == whole[:2].strip()
    with pytest.raises(ConfigError, match="temperature"):
        system.query(questions[0], temperature=-1)


@pytest.mark.slow
def test_answers_after_reasoning_are_what_follows_the_mark(tmp_path):
    passages = [Passage("0", "", "Ann was born in Rome.")]
    system = RAGSystem.build(
        passages, top_k=1, prompt_style="compact_reasoned", max_answer_tokens=40
    )
    system.save(tmp_path)
    loaded = RAGSystem.load(tmp_path)
    assert (loaded.prompts.style, loaded.prompts.max_answer_tokens) == (COMPACT_REASONED, 40)
    question = "Where?"
    prompt = loaded.prompts.prompt(question, [0])

    def saying(text, system):
        writer = scripted(system.generator, text, after=len(prompt))
        generator = dataclasses.replace(system.generator, params=writer.params)
        return dataclasses.replace(
            system, decoder=writer.network, generator=generator, adapters=None
        )

    quote = " Ann was born in Rome." * 3  # with the answer more than 16 tokens
    for text, answer in (
        (f"{quote}Answer: Rome", "Rome"),
        ("Answer: Rome Answer: Oslo", "Rome Answer: Oslo"),
        (" Rome and Oslo", "Rome and Oslo"),
        (f"{quote}Answer:", ""),
    ):
        speaking = saying(text, loaded)
        assert speaking.query(question).answer == answer
        assert "".join(speaking.stream(question)) == answer
    plain = RAGSystem.build(passages, top_k=1)
    assert saying(" Rome.Answer: Oslo", plain).query(question).answer == "Rome.Answer: Oslo"


def test_seeds_of_64_bits_draw_differently():
    """And those of 32 bits as JAX does."""

    def key(seed):
        return jax.random.key_data(Sampling(temperature=1.0, seed=seed).key).tolist()

    assert Sampling(seed=3).key is None
    for seed in (0, 1, 2**31, 2**32 - 1, -1):
        assert key(seed) == jax.random.key_data(jax.random.key(seed)).tolist()
    others = [1, 1 + 2**32, 1 + 2**33, 1 - 2**32, 1 - 2**63, 2**63 - 1, 2**32, 2**40]
    assert len({str(key(seed)) for seed in others}) == len(others)
