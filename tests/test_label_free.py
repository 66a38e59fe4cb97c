"""The steps of label-free fine-tuning: what is kept and dropped, and why; what is asked twice."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import TEXTS, Scripted
from toy_rag import TOKENIZER, toy_parts

from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.generation.author import LocalAuthor, Reply
from fedrag_jax.label_free import pipeline, prompts
from fedrag_jax.label_free.prompts import COMPACT, instruct
from fedrag_jax.models import hub
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever

PROMPTS = instruct("German")


def asking(author, folder, prompts=PROMPTS):
    return pipeline.Asking(author, prompts, folder / "replies")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def number(text):
    return int("".join(c for c in text.split(" was")[0] if c.isdigit()))


# --- 1, rating texts -------------------------------------------------------------------------------


def test_texts_are_kept_by_their_rating_and_every_rejection_has_its_reason(tmp_path):
    odd = [
        Passage("blank", "", " \n"), Passage("word", "", "Hello"),
        Passage("again", "", "Person 3  was born in Town3."),
    ]  # fmt: skip
    written = {0: "9.5", 1: "7", 2: "[8]", 3: "ten", 4: "12", 5: "8 points", 6: "-8"}

    def reply(request):
        n = number(request.user)
        return Reply("10", False) if n == 7 else written.get(n, "10")

    author = Scripted(reply)
    step = pipeline.rate_texts(asking(author, tmp_path), [*TEXTS, *odd], tmp_path)
    assert [*step.kept] == ["t0", "t2", *(f"t{i}" for i in range(8, 12))]
    assert step.counts == {
        "kept": 6, "low": 1, "unparsable": 4, "unfinished": 1, "empty": 1, "short": 1, "duplicate": 1,
    }  # fmt: skip
    told = {line["id"]: line for line in lines(tmp_path / "1_texts.jsonl")}
    assert told["t1"] == {"id": "t1", "kept": False, "reason": "low", "score": "7"}
    assert told["t4"]["reason"] == "unparsable" and told["blank"]["reason"] == "empty"
    assert all(word not in [r.user for r in author.asked] for word in ("Hello", " \n"))
    # The step is as it was for whoever asks for less.
    again = pipeline.rate_texts(asking(author, tmp_path), TEXTS, tmp_path, least=7)
    assert "low" not in again.counts and len(author.asked) == len(TEXTS)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(?P<score>[^\n]+)", {0: "9", 1: "about 8", 2: "nan", 3: "-9", 4: "2"}),
        (r"((?P<score>\d+)|none)( because (?P<why>.+))?", {1: "none", 2: "none because", 3: "11"}),
        (
            r"(?P<score>\d+)( because (?P<why>.+))?",
            {1: "", 2: "8 because", 3: "x", 4: "7 because y"},
        ),
    ],
)
def test_own_prompts_may_match_replies_without_a_rating(pattern, said, tmp_path):
    own = PROMPTS._replace(rate_text=PROMPTS.rate_text._replace(reply=pattern))
    prompts.write(own, tmp_path / "own.json")
    author = Scripted(lambda request: said.get(number(request.user), "9"))
    asked = asking(author, tmp_path, prompts.read(tmp_path / "own.json"))
    step = pipeline.rate_texts(asked, TEXTS[:6], tmp_path)
    low = {"low": 1} if 4 in said else {}
    assert step.counts == {"kept": 3 - len(low), "unparsable": 3} | low
    told = {line["id"]: line for line in lines(tmp_path / "1_texts.jsonl")}
    assert told["t5"] == {"id": "t5", "kept": True, "score": "9"}
    assert told["t4"].get("why") == ("y" if "y" in said.get(4, "") else None)


# --- 2, asking -------------------------------------------------------------------------------------


def question(request):
    n = number(request.user)
    return f"Wo wurde {n} geboren?\n\n### Answer\nTown{n}"


def test_a_question_and_its_answer_are_an_example_about_the_text(tmp_path):
    step = pipeline.ask(asking(Scripted(question), tmp_path), TEXTS[:2], tmp_path)
    assert step.kept == {
        f"t{i}#0": Example(f"t{i}#0", f"Wo wurde {i} geboren?", (f"Town{i}",), (f"t{i}",), "towns")
        for i in range(2)
    }


@pytest.mark.parametrize(
    "reply",
    [
        "Where?",
        "Where?\n\n### Answer\n",
        "### Answer\nTown",
        "  \n### Answer\nTown",
        "",
        "<question>\n\n### Answer\n<answer>",
        "Where?\n\n### Answer\n<answer>\n\nIn Town.",
        "Where?\n\n### Answer\nIn Town.\n\n### Question\nWhen?\n\n### Answer\nThen.",
        "Where?\n\n### Question\nWhen?\n\n### Answer\nThen.",
    ],
)
def test_replies_in_another_form_are_no_questions(reply, tmp_path):
    step = pipeline.ask(asking(Scripted(lambda request: reply), tmp_path), TEXTS[:2], tmp_path)
    assert step.counts == {"kept": 0, "unparsable": 2}
    with pytest.raises(
        DataError, match=r"nothing is left to train on\.\nquestions: 0 of 2; dropped: 2"
    ):
        pipeline.require_some({"questions": step})


@pytest.mark.parametrize("kind", ["short", "examples"])
def test_the_answer_is_a_request_of_its_own(kind, tmp_path):
    written = {("Person 2", "Answer:"): "\n", ("Person 3", "Question:"): "\n"}
    late = ("Person 4", "Answer:")

    def reply(request):
        # The text is the last of a page of examples.
        text = "Person " + str(number(request.user.rpartition("Person ")[2]))
        if (text, request.start) == late:
            return Reply("in a town that", False)
        usual = {"Question:": f" Where was {text} born?", "Answer:": " a town"}[request.start]
        return written.get((text, request.start), usual)

    author = Scripted(reply)
    asked = asking(author, tmp_path, prompts.by_name(kind))
    step = pipeline.ask(asked, TEXTS[:5], tmp_path)
    assert step.kept == {
        f"t{i}#0": Example(
            f"t{i}#0", f"Where was Person {i} born?", ("a town",), (f"t{i}",), "towns"
        )
        for i in range(2)
    }
    assert step.counts == {"kept": 2, "unparsable": 2, "unfinished": 1}
    told = [line.get("reason") for line in lines(tmp_path / "2_questions.jsonl")]
    assert told == [None, None, "unparsable", "unparsable", "unfinished"]
    # Only questions have an answer, and it is asked for with text and question.
    assert [r.start for r in author.asked] == ["Question:"] * 5 + ["Answer:"] * 4
    first = author.asked[5].user
    assert first.strip().endswith("Question: Where was Person 0 born?") and TEXTS[0].text in first
    assert (
        pipeline.ask(asked, TEXTS[:5], tmp_path) == step and step.requests == len(author.asked) == 9
    )


def test_several_questions_are_drawn_and_none_is_kept_twice(tmp_path):
    count = iter(range(100))

    def reply(request):
        i = next(count)
        return f"Question {0 if i % 3 == 2 else i}?\n### Answer\nTown{i}"

    step = pipeline.ask(asking(Scripted(reply), tmp_path), TEXTS[:1], tmp_path, per_text=3)
    assert [*step.kept] == ["t0#0", "t0#1"] and step.counts["duplicate"] == 1
    how = [lines(tmp_path / "replies" / f"ask_{i}.jsonl")[0]["asked"] for i in range(3)]
    assert [h["temperature"] for h in how] == [0.0, 1.0, 1.0]
    seeds = [h["seed"] for h in how]
    for seed in range(1, 4):
        author = asking(Scripted(reply), tmp_path / str(seed))
        pipeline.ask(author, TEXTS[:1], tmp_path, per_text=3, seed=seed)
        files = sorted((tmp_path / str(seed) / "replies").glob("ask_*.jsonl"))
        seeds += [lines(file)[0]["asked"]["seed"] for file in files]
    assert seeds[:3] == [0, 1, 2] and len({*seeds}) == 12
    with pytest.raises(ConfigError, match="per_text must be at least 1"):
        pipeline.ask(asking(Scripted(reply), tmp_path), TEXTS[:1], tmp_path, per_text=0)


def test_a_reply_that_repeats_its_beginning_is_read_all_the_same(tmp_path):
    said = PROMPTS.ask.read("### Question\nWo?\n\n### Answer\nDort\nund da")
    assert said == {"question": "Wo?", "answer": "Dort\nund da"}
    assert PROMPTS.ask.read("\n\n### Question\nWo?\n\n### Answer\nDort\nund da") == said
    assert PROMPTS.rate_text.read("\n### Filter score\n9") == {"score": "9"}
    assert COMPACT.ask.read(" Who?\nAnswer: Ann") == {"question": "Who?", "answer": "Ann"}
    assert COMPACT.ask.read(" Who?\nAnswer: Ann\nBob") is None


# --- 3, rating questions -----------------------------------------------------------------------------


def test_a_question_is_kept_if_it_and_its_answer_are_good(tmp_path):
    examples = [Example(f"e{i}", f"Q{i}?", (f"A{i}",), (f"t{i}",)) for i in range(4)]

    def reply(request):
        answers = "### Answer" in request.user
        n = number(request.user)
        return {(1, False): "7", (2, True): "3", (3, True): "?"}.get((n, answers), "9")

    author = Scripted(reply)
    step = pipeline.rate_questions(asking(author, tmp_path), examples, TEXTS, tmp_path)
    assert [*step.kept] == ["e0"]
    reasons = [line.get("reason") for line in lines(tmp_path / "3_ratings.jsonl")]
    assert reasons == [None, "question low", "answer low", "answer unparsable"]
    assert author.asked[0].user == ("### Context\nPerson 0 was born in Town0.\n\n### Question\nQ0?")
    assert author.asked[4].user.endswith("### Question\nQ0?\n\n### Answer\nA0")


def test_a_title_that_the_text_does_not_name_is_asked_about_too(tmp_path):
    author = Scripted(lambda request: "10")
    texts = [Passage("a", "Ann", "She was born in Rome."), Passage("b", "Bob", "Bob was born.")]
    pipeline.rate_texts(asking(author, tmp_path), texts, tmp_path)
    assert [r.user for r in author.asked] == ["Ann She was born in Rome.", "Bob was born."]


# --- files -----------------------------------------------------------------------------------------


def test_what_was_asked_is_not_asked_again_and_the_rest_is(tmp_path):
    class Killed(Exception):
        pass

    def reply(request):
        if len(author.asked) > label_free_at_once:
            raise Killed
        return question(request)

    label_free_at_once = 64
    many = [Passage(f"m{i}", "", f"Person {i} was born in Town{i}.") for i in range(100)]
    author = Scripted(reply)
    with pytest.raises(Killed):
        pipeline.ask(asking(author, tmp_path), many, tmp_path)
    path = tmp_path / "replies" / "ask_0.jsonl"
    assert len(lines(path)) == 65
    with open(path, "a") as file:
        file.write('{"id": "m64", "about"')  # a line cut short
    author = Scripted(question)
    step = pipeline.ask(asking(author, tmp_path), many, tmp_path)
    assert len(step.kept) == 100 and len(author.asked) == 36
    assert len(lines(path)) == 101
    # A text that has changed is asked about again, a line of another script's paragraphs is one line.
    changed = [Passage("m0", "", "Person 5\u2028 was born in {text}."), *many[1:]]
    step = pipeline.ask(asking(author, tmp_path), changed, tmp_path)
    assert len(author.asked) == 37 and step.kept["m0#0"].answers == ("Town5",)
    assert author.asked[-1].user == changed[0].text


def test_files_of_other_prompts_or_authors_are_not_read(tmp_path):
    pipeline.rate_texts(asking(Scripted(lambda r: "9"), tmp_path), TEXTS, tmp_path)
    other = Scripted(lambda r: "9")
    other.name = "another"
    for author, asked in ((other, PROMPTS), (Scripted(lambda r: "9"), instruct("French"))):
        if asked is not PROMPTS:
            asked = asked._replace(rate_text=asked.rate_text._replace(system="Otherwise."))
        with pytest.raises(ConfigError, match=r"rate_text.jsonl holds replies to other requests"):
            pipeline.rate_texts(asking(author, tmp_path, asked), TEXTS, tmp_path)


def test_replies_of_other_weights_under_the_same_name_are_not_read(tmp_path):
    model = hub.load("builtin:decoder")
    other = model.with_arrays(jax.tree.map(jnp.zeros_like, model.params))

    def rated(model):
        author = asking(LocalAuthor(model), tmp_path, COMPACT)
        return pipeline.rate_texts(author, TEXTS[:2], tmp_path).counts

    counts = rated(model)
    with pytest.raises(ConfigError, match=r"rate_text.jsonl holds replies to other requests"):
        rated(other)
    assert rated(dataclasses.replace(model)) == counts
    # A file that does not say which weights is read as before.
    path = tmp_path / "replies" / "rate_text.jsonl"
    head, *rest = lines(path)
    del head["fingerprint"]
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *rest]))
    assert rated(other) == counts and lines(path) == [head, *rest]


# --- prompts and authors ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retriever():
    parts = toy_parts()
    model = hub.Pretrained(parts.encoder, parts.query, TOKENIZER, "toy")
    return Retriever.build(model, TEXTS)


def test_all_steps_at_once_do_what_each_does(retriever, tmp_path):
    def reply(request):
        n = number(request.user)
        if "You write a question" in request.system:
            return question(request)
        return "3" if (n == 1 and "### Context" not in request.user) else "10" if n != 2 else "?"

    def made(folder, **how):
        author = asking(Scripted(reply), tmp_path / "shared")
        return pipeline.generate(author, TEXTS, retriever, tmp_path / folder, n=4, **how)

    plain = made("plain")
    assert [e.id for e in plain.examples] == [f"t{i}#0" for i in (0, *range(3, 12))]
    assert [*plain.contexts] == [e.id for e in plain.examples] and [*plain.steps] == [
        "texts", "questions", "contexts",
    ]  # fmt: skip
    rated = made("rated", filter_texts=False, filter_questions=True)
    assert [e.id for e in rated.examples] == [f"t{i}#0" for i in (0, 1, *range(3, 12))]
    assert not (tmp_path / "rated" / "1_texts.jsonl").exists()
    assert pipeline.total_counts([plain.steps, rated.steps]) == {
        "texts kept": 10, "texts low": 1, "texts unparsable": 1, "questions kept": 22,
        "contexts kept": 21, "ratings kept": 11, "ratings question unparsable": 1,
        "requests": 12 + 10 + 12 + 2 * 12,
    }  # fmt: skip
    # Replies are shared: what one run asked, the next does not.
    assert len(lines(tmp_path / "shared" / "replies" / "ask_0.jsonl")) == 1 + 12


def test_prompts_go_to_a_file_and_back(tmp_path):
    path = tmp_path / "prompts.json"
    prompts.write(PROMPTS, path)
    assert prompts.read(path) == PROMPTS
    for kind in ("compact", "short", "examples"):
        prompts.write(prompts.by_name(kind), tmp_path / f"{kind}.json")
        assert prompts.by_name(str(tmp_path / f"{kind}.json")) == prompts.by_name(kind)
    with pytest.raises(ConfigError, match=r"unknown prompts 'none'; choose among \['compact',"):
        prompts.by_name("none")
    fields = json.loads(path.read_text())
    fields["ask"]["reply"] = "(?P<question>.+)"
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="ask: reply has no group named 'answer'"):
        prompts.read(path)
    told = PROMPTS._replace(ask=PROMPTS.ask._replace(system="In {language}, {please}."))
    prompts.write(told, path)
    assert prompts.read(path, "Thai").ask.system == "In Thai, {please}."
    for name, field, value, why in (
        ("rate_text", "system", 5, "rate_text: system must be of type str, got 5"),
        ("ask", "max_tokens", "many", "ask: max_tokens must be of type int, got 'many'"),
        ("ask", "chat", 1, "ask: chat must be of type bool, got 1"),
        ("ask", "user", "{texts}", r"ask: user has no {text}, which is filled in"),
        ("rate_answer", "user", "{text} {question}", "rate_answer: user has no {answer}, which"),
    ):
        prompts.write(PROMPTS, path)
        wrong = json.loads(path.read_text())
        wrong[name][field] = value
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=why):
            prompts.read(path)
    path.write_bytes('{"ask": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"no prompts for label-free fine-tuning .*utf-8"):
        prompts.read(path)
    for text in ("{}", "[", "5", "[1]", json.dumps(fields | {"more": 1})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no prompts for label-free fine-tuning"):
            prompts.read(path)


def test_questions_without_a_gold_passage_of_the_corpus_are_named(retriever, tmp_path):
    for golds in ((), ("nowhere",), (TEXTS[0].id, "nowhere")):
        wrong = Example("q7", "Who?", ("Ada",), golds)
        with pytest.raises(DataError, match=r"question 'q7' needs a gold passage, all of them in"):
            pipeline.add_hard_negatives(retriever, [wrong], tmp_path, 3)


@pytest.mark.slow
def test_the_built_in_decoder_rates_and_asks(tmp_path):
    """It was taught to: junk has no question to be asked about it."""
    from fedrag_jax.data import synthetic

    world = synthetic.generate()
    junk = [p for p in world.passages if not p.title][:8]
    some = [p for p in world.passages if p.title][:24]
    author = LocalAuthor(hub.load("builtin:decoder"))
    rated = pipeline.rate_texts(asking(author, tmp_path, COMPACT), [*junk, *some], tmp_path)
    assert {p.title != "" for p in rated.kept.values()} == {True} and len(rated.kept) > 20
    asked = pipeline.ask(asking(author, tmp_path, COMPACT), rated.kept.values(), tmp_path)
    text = {p.id: p.text for p in some}
    told = [e.answers[0] in text[e.positive_ids[0]] for e in asked.kept.values()]
    assert len(told) > 18 and np.mean(told) > 0.9


@pytest.mark.slow
def test_ten_megabytes_in_one_text_are_read_as_far_as_they_fit(tmp_path):
    story, unbroken = "Ann Bo was born in Rome. " * 400_000, "x" * 10_000_000
    texts = [Passage("story", "", story), Passage("unbroken", "", unbroken), *TEXTS]
    system = RAGSystem.build(
        texts, generator="builtin:citing", prompt_style="compact_cited", max_passage_tokens=64
    )
    lengths = [len(system.prompts.prompt("Who?", [row])) for row in range(2)]
    assert max(lengths) < 64 + 20 and system.prompts.share_cut == 2 / 14
    author = LocalAuthor(system.generator)
    rated = pipeline.rate_texts(asking(author, tmp_path, COMPACT), texts, tmp_path)
    assert sum(rated.counts.values()) == 14
    examples = [Example("e", "Where was Ann Bo born?", ("Rome",), ("story",))]
    step = pipeline.add_hard_negatives(system.retriever, examples, tmp_path, n=3)
    assert 0 in step.kept["e"].rows
