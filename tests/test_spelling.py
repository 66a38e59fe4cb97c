"""Prompts of tokenizers like SentencePiece: the tokens of the whole text, whatever its parts."""

import copy

import jax
import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.prompts import CITED, COMPACT, COMPACT_CITED, INSTRUCT, named_style
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.generation.author import LocalAuthor, Request
from fedrag_jax.models import hub
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.teachers import question_likelihood

PASSAGES = [
    Passage("a", "", "Ada Lovelace was born in London, and wrote of engines."),
    Passage("b", "", "In Rome lived Bob; he saw nobody there.\nSo he said."),
    Passage("c", "", "A very long passage about an engine " * 20),
]
EXAMPLES = [
    Example("q", "Where was Ada Lovelace born?", ("London",), ()),
    Example("r", "Whom did Bob see in Rome?", ("nobody there",), ()),
]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def trained(kind):
    """A tokenizer of pieces that begin with a space, written as ▁, trained on the lines here."""
    texts = [p.text for p in PASSAGES] + [e.question for e in EXAMPLES] + [INSTRUCT.opening]
    lines = [
        line for text in texts for line in text.split("\n")
    ]  # a line break is left to its byte
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    scheme = "first" if kind == "first" else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    if kind == "llama 2":  # the text is one word
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = MISTRAL
    return made


@pytest.fixture(scope="module", params=["always", "first", "llama 2"])
def tokenizer(request):
    return trained(request.param)


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def style_of(name, tokenizer):
    styles = {"compact": COMPACT, "instruct": INSTRUCT, "compact_cited": COMPACT_CITED}
    return styles.get(name) or named_style(name, tokenizer)


STYLES = ["compact", "instruct", "compact_cited", "chat"]


def text_of(style, question, passages):
    texts = [style.passage.format(text=p.text, number=n) for n, p in enumerate(passages, 1)]
    return style.opening + "".join(texts) + style.question.format(question=question)


@pytest.mark.parametrize("name", STYLES)
def test_a_prompt_has_the_tokens_of_its_text(tokenizer, name):
    style = style_of(name, tokenizer)
    prompts = Prompts(tokenizer, style, PASSAGES, EXAMPLES)
    for rows in ([0], [1, 0], [0, 2, 1], []):
        for row in (rows, [PASSAGES[i] for i in rows]):
            found = prompts.prompt(EXAMPLES[0].question, row).tolist()
            text = text_of(style, EXAMPLES[0].question, [PASSAGES[i] for i in rows])
            assert found == [1] * style.bos + whole(tokenizer, text)


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_has_the_tokens_that_follow_its_prompt(tokenizer, name):
    style = style_of(name, tokenizer)
    prompts = Prompts(tokenizer, style, PASSAGES, EXAMPLES)
    table = prompts.training_table(EXAMPLES, np.array([[0, 1], [1, 0]]), per_passage=False)
    for i, (example, rows) in enumerate(zip(EXAMPLES, ([0, 1], [1, 0]), strict=True)):
        length = table["lengths"][i, 0]
        text = text_of(style, example.question, [PASSAGES[row] for row in rows])
        both = text + style.answer.format(answer=example.answer)
        tokens = table["tokens"][i, 0, :length].tolist()
        assert tokens == [1] * style.bos + whole(tokenizer, both) + [prompts.eos]
        places = table["answer_positions"][i, 0][table["answer_mask"][i] > 0]
        scored = tokenizer.decode(table["tokens"][i, 0][places][:-1])
        assert scored.strip() == example.answer


def test_what_does_not_fit_is_cut_from_the_passages(tokenizer):
    prompts = Prompts(tokenizer, INSTRUCT, PASSAGES, EXAMPLES, max_passage_tokens=30)
    question = EXAMPLES[1].question
    full = prompts.prompt(question, [0, 1, 2])
    asked = len(prompts.question_tokens(question))
    text = tokenizer.decode(prompts.prompt(question, [2]))
    assert text.count("engine") < 8 and prompts.share_cut == 1 / 3
    for width in (len(full) - 1, len(full) - 40, asked + 3):
        cut = prompts.prompt(question, [0, 1, 2], width)
        kept = width - asked - 1  # a line break comes between a cut passage and the question
        assert len(cut) == width
        assert cut[:kept].tolist() == full[:kept].tolist()
        assert tokenizer.decode(cut[kept : kept + 1]) == "\n"
        assert cut[-asked:].tolist() == full[-asked:].tolist()


def test_places_of_passages_are_those_of_their_tokens(tokenizer):
    prompts = Prompts(tokenizer, COMPACT, PASSAGES, EXAMPLES)
    prompts = prompts.wide_enough_for(EXAMPLES, contexts=[[0, 1]])
    (places,) = prompts.passage_places(EXAMPLES[:1], [[0, 1]])
    tokens = prompts.prompt(EXAMPLES[0].question, [0, 1])
    for row in (0, 1):
        of_passage = tokenizer.decode(tokens[np.flatnonzero(places[: len(tokens)] == row)])
        assert of_passage.split() == PASSAGES[row].text.split()


def test_places_end_where_a_prompt_is_cut(tokenizer, monkeypatch):
    """The line break after what is left belongs to the passage before it, at every width."""
    prompts = Prompts(tokenizer, COMPACT, PASSAGES, EXAMPLES)
    prompts = prompts.wide_enough_for(EXAMPLES, contexts=[[0, 1]])
    example, both = EXAMPLES[0], [[0, 1]]
    (whole,) = prompts.passage_places([example], both)
    asked = len(prompts.question_tokens(example.question)) + len(
        prompts.answer_tokens(example.answer)
    )
    of_passages = np.flatnonzero(whole >= 0)
    for read in range(of_passages[0] + 2, of_passages[-1] + 1):
        monkeypatch.setattr(prompts, "training_width", lambda *_, read=read: read + asked)
        (places,) = prompts.passage_places([example], both)
        kept = read - 1  # and the line break
        expected = [*whole[:kept], whole[kept - 1], *[-1] * asked]
        assert places.tolist() == expected
        tokens = prompts.training_table([example], both, per_passage=False)["tokens"][0, 0]
        assert tokenizer.decode(tokens[kept : kept + 1]) == "\n"


@pytest.mark.parametrize("style", [COMPACT, INSTRUCT, CITED], ids=["compact", "instruct", "cited"])
@pytest.mark.parametrize("kind", ["byte level", "always", "llama 2"])
def test_a_cut_passage_keeps_the_line_breaks_after_it(kind, style):
    byte_level = kind == "byte level"
    tokenizer = hub.load("builtin:decoder").tokenizer if byte_level else trained(kind)
    ending = style.passage.partition("{text}")[2]
    texts = [
        tokenizer.decode(made.prompt("Who?", [2, 2, 0]))
        for made in (Prompts(tokenizer, style, PASSAGES, EXAMPLES, most) for most in (30, 500))
    ]
    assert len(texts[0]) < len(texts[1]) - 500
    assert texts[0].count(ending) == texts[1].count(ending) >= 3


def test_byte_level_prompts_are_put_together_from_parts():
    assert Spelling(hub.load("builtin:decoder").tokenizer).adds_up
    assert not Spelling(trained("always")).adds_up


@pytest.mark.parametrize("kind", ["always", "first", "llama 2"])
def test_what_an_author_is_asked_has_the_tokens_of_its_text(kind):
    tokenizer = trained(kind)
    config = DecoderConfig(len(tokenizer), 8, 8, 1, 1, 1, 8, max_positions=200)
    author = LocalAuthor(hub.Pretrained(Network.of(Decoder, config), None, tokenizer, "mine"))
    asked = author._prompt(Request("Be brief.", PASSAGES[0].text, " Yes,"), 150)
    said = f"<s>[INST] Be brief.\n\n{PASSAGES[0].text} [/INST] Yes,"
    assert asked.tolist() == whole(tokenizer, said)
    cut = author._prompt(Request("Be brief.", PASSAGES[2].text, " Yes,"), 60)
    assert 50 < len(cut) <= 60 and tokenizer.decode(cut).endswith("[/INST] Yes,")


def test_one_line_answers_end_at_line_breaks_that_are_pieces(tokenizer):
    """As in the vocabulary of Gemma, whose pieces are "\\n", "\\n\\n" and so on."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken("\n", normalized=False), AddedToken("\n\n", normalized=False)])
    for text in ("Rome\nBob", "Rome\n\nBob"):
        line = made.convert_tokens_to_ids(text.removeprefix("Rome").removesuffix("Bob"))
        assert line in whole(made, text)
        assert line in Prompts(made, COMPACT, PASSAGES, []).stop_tokens
        assert line not in Prompts(made, INSTRUCT, PASSAGES, []).stop_tokens


def test_a_question_is_scored_as_the_whole_text_is_spelled(tokenizer):
    config = DecoderConfig(len(tokenizer), 16, 24, 1, 2, 1, 8)
    network = Network.of(Decoder, config)
    params, question = network.init(jax.random.key(0)), EXAMPLES[0].question
    model = hub.Pretrained(network, params, tokenizer, "mine")
    system = RAGSystem.build(PASSAGES, generator=model, top_k=1)
    before = f"Text: {PASSAGES[0].text}\nAsk:"
    row = np.array([whole(tokenizer, f"{before} {question}")])
    hidden = network(params, row, np.arange(row.shape[1])[None], np.ones_like(row))
    log_probs = jax.nn.log_softmax(network(params, hidden, method="logits")[0])
    places = np.arange(len(whole(tokenizer, before)), row.shape[1])
    expected = np.mean(log_probs[places - 1, row[0, places]])
    (found,) = question_likelihood(system)([question], [PASSAGES[0].text])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
