"""What the built-in decoder is pretrained on, and the start it is pretrained from."""

import collections
import json
import re

import jax
import numpy as np
import pytest

from experiments import pretrain_tiny, pretraining_rows
from fedrag_jax.data import synthetic
from fedrag_jax.models import fetching, hub
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.network import Network
from fedrag_jax.models.rotary import rope_frequencies


@pytest.mark.slow
def test_the_tokenizer_is_the_one_that_is_shipped():
    worlds = [synthetic.generate(config) for config in pretrain_tiny.WORLDS]
    made = json.loads(pretrain_tiny.train_tokenizer(worlds).to_str())
    shipped = json.loads((fetching.BUILTIN / "decoder" / "tokenizer.json").read_text())
    assert made["model"] == shipped["model"]


@pytest.fixture(scope="module")
def reader():
    world = synthetic.generate(pretrain_tiny.WORLDS[0])
    tokenizer = hub.load("builtin:decoder").tokenizer
    return pretraining_rows.Reader(world, tokenizer, np.random.default_rng(0))


def test_heads_of_the_first_layer_look_one_to_four_tokens_back(reader):
    config = pretrain_tiny.DECODER
    network = Network.of(Decoder, config)
    rng = np.random.default_rng(0)
    params = network.init(jax.random.key(0))
    params = pretrain_tiny.recalling(params, config, reader.tokenizer, rng)
    x = np.asarray(params["embed"]["embedding"])[rng.integers(config.vocab_size, size=40)]
    x = x / np.sqrt((x**2).mean(1, keepdims=True))
    angles = np.arange(40)[:, None] * rope_frequencies(config)

    def turned(y):
        first, second = np.split(y, 2, axis=1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)

    attention = jax.tree.map(lambda w: np.asarray(w)[0], params["layers"]["attention"])
    for head in range(4):
        columns = slice(32 * head, 32 * head + 32)
        q = turned(x @ attention["q_proj"]["kernel"][:, columns])
        k = turned(x @ attention["k_proj"]["kernel"][:, columns])
        scores = np.where(np.tri(40, dtype=bool), q @ k.T, -np.inf)
        aim = np.arange(head + 1, 40) - head - 1
        hit = (scores.argmax(1)[head + 1 :] == aim).mean()  # constants weigh less in longer vectors
        assert hit > 0.6


def text(reader, row, least=0.0):
    return reader.tokenizer.decode([token for token, weight in row if weight >= least])


def test_sentences_state_one_fact_of_several_entities(reader):
    for _ in range(20):
        row = text(reader, reader.sentences(3))
        told = row.removeprefix("<s>").split("\n")[:3]
        assert all(s.endswith(".") for s in told) and len(set(told)) == 3
        ways = ("born in", "trained at", "settled in", "belongs to", " by ")
        assert len({next((way for way in ways if way in s), "shown") for s in told}) == 1


def test_a_context_holds_what_is_asked(reader):
    for k in (1, 3):
        row = reader.read(k)
        answers = text(reader, row, least=1.0).split("</s>")[:-1]
        context = text(reader, row).split("?")[0]
        assert 1 <= len(answers) <= pretraining_rows.QUESTIONS
        assert all(answer.strip() in context for answer in answers)


def test_several_citations_name_the_passage_that_tells_or_none(reader):
    seen = collections.Counter()
    for _ in range(20):
        context, *asked = text(reader, reader.cite_several(3, unknown=0.4)).split("Question: ")
        passages = context.removeprefix("<s>").strip().split("\n")
        assert [p.split(": ")[0] for p in passages] == ["1", "2", "3"]
        for one in asked:
            number, answer = re.search(r"Cite: (\d)\nAnswer: (.+)</s>", one).groups()
            seen[number] += 1
            if number == "0":
                assert answer == "unknown"
            else:
                assert answer in passages[int(number) - 1]
    assert {*seen} == {"0", "1", "2", "3"} and 10 < seen["0"] < 60


def test_ratings_tell_right_questions_and_answers_from_wrong_ones(reader):
    names = {p.text: p.title for p in reader.world.passages}
    seen = collections.Counter()
    for _ in range(200):
        said = text(reader, reader.rate_pair())
        passage, question, answer, rating = re.fullmatch(
            r"<s>Text: (.+)\nQuestion: (.+?)(?:\nAnswer: (.+?))?\nRate: (\d+)</s>", said
        ).groups()
        kind = "question" if answer is None else "answer"
        seen[kind, rating] += 1
        assert rating in ("0", "10")
        if answer is None:
            assert (names[passage] in question) == (rating == "10")
        elif rating == "10":
            assert answer in passage
    assert len(seen) == 4 and min(seen.values()) > 15


def test_rows_are_packed_with_their_scored_positions(reader):
    rows = [reader.read(2), reader.copy(64), reader.cite(2), reader.ask(), reader.rate()]
    batch = pretraining_rows.pack(rows, pad=0)
    assert batch["tokens"].shape[1] % 32 == 0
    for i, row in enumerate(rows):
        scored = [(token, weight) for token, weight in row if weight]
        at = batch["positions"][i, : len(scored)]
        assert batch["tokens"][i, at].tolist() == [token for token, _ in scored]
        np.testing.assert_allclose(batch["weight"][i, : len(scored)], [w for _, w in scored])
        assert not batch["weight"][i, len(scored) :].any()


def test_noise_comes_between_the_first_token_and_the_question():
    tokens = np.arange(1000, 1000 + 40 * 6).reshape(40, 6)
    mask = np.tile(np.arange(6) < 4, (40, 1))
    noisy = pretrain_tiny._interrupted({"tokens": tokens, "mask": mask}, np.random.default_rng(0))
    counts = set()
    for i in range(40):
        count = noisy["mask"][i].sum() - 4
        counts.add(int(count))
        assert noisy["mask"][i, : 4 + count].all()
        assert noisy["tokens"][i, 0] == tokens[i, 0]
        assert noisy["tokens"][i, count + 1 : count + 4].tolist() == tokens[i, 1:4].tolist()
    assert counts == set(range(pretrain_tiny.NOISE + 1))
