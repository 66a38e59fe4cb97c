"""Who is asked about texts: in a chat template, or to continue a page of examples."""

import dataclasses

import pytest
import transformers

from fedrag_jax.generation.author import LocalAuthor, Reply, Request
from fedrag_jax.generation.text import Sampling
from fedrag_jax.label_free import pipeline, prompts
from fedrag_jax.models import hub


def test_a_local_author_is_asked_in_its_template_and_cuts_what_does_not_fit():
    model = hub.load("builtin:decoder")
    author = LocalAuthor(model)
    request = Request("Be short.", "Text: a text\n", "Rate:")
    prompt = author._prompt(request, 100)
    assert model.tokenizer.decode(prompt) == "<s>Be short.\n\nText: a text\nRate:"
    long = Request("", "word " * 4_000_000, "Rate:")
    prompt = author._prompt(long, 50)
    assert len(prompt) == 50 and model.tokenizer.decode(prompt).endswith("Rate:")
    replies = author([request, long], Sampling(max_new_tokens=4))
    assert len(replies) == 2 and all(isinstance(r, Reply) for r in replies)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (kind, what)
        for kind in ("compact", "short", "examples", "instruct")
        for what in prompts.FILLED
        if getattr(prompts.by_name(kind), what)
    ],
)
def test_a_text_that_does_not_fit_is_cut_and_the_question_about_it_is_not(kind, what, tmp_path):
    model, asked = hub.load("builtin:decoder"), []

    class Remembers:
        name = "remembers"

        def __call__(self, requests, sampling):
            asked.extend(requests)
            return [Reply("9", True) for _ in requests]

    parts = {"text": "Ann Bo was born in Rome. " * 400, "question": "Who met Zut?", "answer": "Al"}
    about = {"long": parts, "short": parts | {"text": "A text."}}
    pipeline.Asking(Remembers(), prompts.by_name(kind), tmp_path)(what, about, "rate")
    # As much as the longest page of examples needs, and far less than the text.
    long, short = (LocalAuthor(model)._prompt(request, 900) for request in asked)
    written = model.tokenizer.decode(long)
    assert len(long) == 900 and "Ann Bo was born in Rome. Ann" in written
    ending = model.tokenizer.decode(short).rpartition("A text.")[2]
    assert "Who met Zut?" in ending and written.endswith(ending)


def test_prompts_with_examples_are_continued_without_a_template(tmp_path):
    shown, model = prompts.examples(), hub.load("builtin:decoder")
    for ask in shown:
        assert ask.user.endswith(("\n", "{text}\n")) and not ask.chat and ask.stop
        # What the page shows is read as replies are.
        page, _, _ = ask.user.partition("Text: {text}")
        shown_parts = page.split("\n\n")[:-1]
        replied = [part.partition(ask.start)[2].partition("\n")[0] for part in shown_parts]
        read = [ask.read(said) for said in replied]
        assert len(read) >= 3 and None not in read, ask.start
    assert shown.ask.read(" Who is it?") == {"question": "Who is it?"}
    assert shown.answer.read(" Ada") == {"answer": "Ada"}

    chatty = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend_tokenizer
    )
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    author = LocalAuthor(dataclasses.replace(model, tokenizer=chatty))
    for chat in (True, False):
        request = Request("", "Text: a text\n", "Useful:", chat)
        prompt = chatty.decode(author._prompt(request, 100))
        assert ("[user]" in prompt) == chat and prompt.endswith(
            "Text: a text\nUseful:" if not chat else "Useful:"
        )

    asked = []

    class Continues:
        name = "continues"

        def __call__(self, requests, sampling):
            asked.append((requests[0], sampling.stop))
            return [Reply(" 9", True) for _ in requests]

    about = {"a": {"text": "A text of some words."}}
    pipeline.Asking(Continues(), shown, tmp_path)("rate_text", about, "rate")
    ((request, stop),) = asked
    assert request.chat is False and stop == ("\n",)
    assert request.user.endswith("Text: A text of some words.\n") and request.start == "Useful:"
