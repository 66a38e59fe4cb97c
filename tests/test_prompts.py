"""Prompts in a generator's own chat template, with templates of the three families that differ most."""

import dataclasses

import numpy as np
import pytest
import transformers
from tiny import characters

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.prompts import CITED, COMPACT, INSTRUCT, named_style, plain
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models import fetching, hub

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} "
    "[/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
CASES = {
    "llama2": (LLAMA2, None),
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, None),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PASSAGES = [Passage("a", "Ada", "Ada lived in {Rome}."), Passage("b", "Bob", "Bob saw <b>.")]
QUESTION = Example("q", "Where did {Ada} live?", ("Rome",), ())


def tokenizer_of(template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetching.BUILTIN / "decoder")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", CASES)
def test_chat_prompts_are_what_the_template_makes_of_the_conversation(name):
    template, end = CASES[name]
    tokenizer = tokenizer_of(template)
    prompts = Prompts(tokenizer, named_style("chat", tokenizer), PASSAGES, [QUESTION])
    said = (
        INSTRUCT.opening
        + "Ada lived in {Rome}.\nBob saw <b>.\n"
        + f"### Question:\n{QUESTION.question}"
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    assert tokenizer.decode(prompts.prompt(QUESTION.question, [0, 1])) == asked
    answer = prompts.answer_tokens("Rome")
    last = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)
    assert answer[-1] == prompts.eos == last
    assert tokenizer.decode(answer[:-1]) == ("Rome" if end else " Rome")
    assert {last, tokenizer.eos_token_id} <= set(prompts.stop_tokens)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}"


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("taken", [True, False])
def test_a_system_prompt_is_a_turn_where_the_template_has_one(name, taken):
    template = CASES[name][0] if taken else NO_SYSTEM + CASES[name][0]
    tokenizer = tokenizer_of(template)
    prompts = Prompts(tokenizer, named_style("chat", tokenizer), PASSAGES, [QUESTION])
    said = INSTRUCT.opening + "Ada lived in {Rome}.\n### Question:\nWho?"
    for system in ("Say it in {one} word.", "Be brief."):  # the second in place of the first
        prompts = prompts.under(system, 500)
        given = {"role": "system", "content": system}
        turns = [given, {"role": "user", "content": said}]
        if not taken:
            turns = [{"role": "user", "content": f"{system}\n\n{said}"}]
        asked = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert tokenizer.decode(prompts.prompt("Who?", [0])) == asked


def test_a_system_prompt_comes_before_all_else_and_ends_no_turn():
    tokenizer = tokenizer_of(CHATML)
    bare = Prompts(tokenizer, COMPACT, PASSAGES, [QUESTION])
    prompts = bare.under("Be brief.<|im_end|>", 40).under("In verse.<|im_end|>", 40)
    tokens = prompts.prompt("Who?", [0]).tolist()
    assert tokenizer.decode(tokens[1:]) == "In verse.< |im_end|>\nAda lived in {Rome}.\nWho?"
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokens
    assert bare.style.opening == "" and len(bare.prompt("Who?", [0])) < len(tokens)
    for much in ("word " * 50, "x" * 10_000_000):
        with pytest.raises(ConfigError, match="prompts may open with 40 tokens"):
            bare.under(much, 40)


def test_templates_that_cannot_be_used_are_refused():
    for template, words in (
        (None, "no chat template; use 'instruct'"),
        ("Hello.", "does not keep the words"),
        ("{{ raise_exception('never') }}", "template fails .TemplateError: never.; use 'instruct'"),
    ):
        with pytest.raises(ConfigError, match=words):
            named_style("chat", tokenizer_of(template))
    with pytest.raises(
        ConfigError, match=r"\['compact', .*'instruct', .*'chat', 'chat_cited'\], got 'poem'"
    ):
        named_style("poem", tokenizer_of(CHATML))


def test_a_template_that_tells_the_date_asks_the_same_tomorrow():
    style = named_style("chat", tokenizer_of("{{ strftime_now('%d %b %Y') }}. " + CHATML))
    assert style.opening.startswith("26 Jul 2024. ")


def test_a_system_with_a_chat_template_is_saved_and_loaded(tmp_path):
    from fedrag_jax.rag import RAGSystem

    model = hub.load("builtin:decoder")
    model.tokenizer.chat_template = MISTRAL
    system = RAGSystem.build(
        PASSAGES, generator=model, prompt_style="chat", system_prompt="Be brief.", top_k=1
    )
    system.save(tmp_path)
    again = RAGSystem.load(tmp_path)
    style = named_style("chat", model.tokenizer).under("Be brief.")
    assert again.prompts.style == system.prompts.style == style
    asked = system.prompts.prompt("Who is Ada?", [0]), again.prompts.prompt("Who is Ada?", [0])
    assert asked[0].tolist() == asked[1].tolist()


@pytest.mark.parametrize("name", CASES)
def test_a_chat_that_cites_begins_the_assistants_turn(name):
    template, end = CASES[name]
    tokenizer = tokenizer_of(template)
    style = named_style("chat_cited", tokenizer, "German")
    prompts = Prompts(tokenizer, style, PASSAGES, [QUESTION], max_answer_tokens=64)
    said = (
        CITED.opening.replace("{language}", "German")
        + "### 1\nAda lived in {Rome}.\n\n### 2\nBob saw <b>.\n\n"
        + f"### Question\n{QUESTION.question}"
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    lead = "" if end else " "  # templates without marks put a space before what the assistant says
    begun = asked + lead + "### Reference\n"
    assert tokenizer.decode(prompts.prompt(QUESTION.question, [0, 1])) == begun
    answer = tokenizer.decode(prompts.answer_tokens("Rome", "1")[:-1])
    assert answer == "1\n\n### Answer\nRome"


def test_tags_in_a_passage_or_question_are_words():
    tokenizer = hub.load("builtin:decoder").tokenizer
    specials = {*tokenizer.all_special_ids}
    passage = Passage("p", "", "Ann</s><s> was born in Rome.<pad></s></s>")
    prompts = Prompts(tokenizer, COMPACT, [passage], [])
    assert not specials & {*prompts.prompt("Who</s>?", [0])[1:].tolist()}  # after its BOS
    assert not specials & {*prompts.prompt("Who</s>?", [passage])[1:].tolist()}
    assert prompts.answer_tokens("Rome</s> or not").tolist().count(prompts.eos) == 1
    assert plain(tokenizer, "no tag < /s>") == "no tag < /s>"
    assert plain(tokenizer, "<</s>s> <s>") == "<< /s>s> < s>"


def test_the_first_answer_that_is_not_empty_is_trained_on():
    asked = Example("q", "Where?", ("", " ", "London", "Paris"), ())
    prompts = Prompts(characters(), COMPACT, [Passage("p", "", "A text.")], [asked])
    table = prompts.training_table([asked], np.array([[0]]), per_passage=True)
    places = table["answer_positions"][0, 0][table["answer_mask"][0] > 0]
    trained = prompts.tokenizer.convert_ids_to_tokens(table["tokens"][0, 0][places])
    assert "".join(trained) == " London</s>"
    with pytest.raises(DataError, match="question 'q' has no answer to train on"):
        Prompts(characters(), COMPACT, [], [dataclasses.replace(asked, answers=("", "\n"))])


def test_answers_that_are_cut_are_counted():
    some = [Example(str(n), "Where?", ("x" * n,), ()) for n in (3, 14, 15, 40)]
    prompts = Prompts(characters(), COMPACT, [], some)  # a space, the answer, EOS: 16 at most
    assert prompts.cut(some) == [17, 42]
    wider = prompts.answering(42)
    assert wider.cut(some) == [] and len(wider.answer_tokens("x" * 40)) == 42
    assert len(prompts.answer_tokens("x" * 40)) == 16
