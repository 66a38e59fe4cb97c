"""Answers that cite the passages they come from."""

import jax
import numpy as np
import pytest
from toy_rag import EXAMPLES, KEY, PASSAGES, TOKENIZER, batch_of, toy_parts

from fedrag_jax.data import synthetic
from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.citations import cite, cited
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.prompts import COMPACT, COMPACT_CITED
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.citing import (
    citation_scores,
    contexts_of,
    evaluate_citing,
    without_gold,
)
from fedrag_jax.models import hub
from fedrag_jax.objectives.citing import Context, citing
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.retriever import Retriever


def test_passages_are_numbered_from_one_and_cited_before_the_answer():
    prompts = Prompts(TOKENIZER, COMPACT_CITED, PASSAGES, EXAMPLES, max_answer_tokens=40)
    example, rows = EXAMPLES[0], [2, -1, 0]
    written = [*prompts.prompt(example.question, rows), *prompts.answer_tokens("Rome", "2")]
    assert "".join(TOKENIZER.convert_ids_to_tokens(written)) == (
        "<s>1: Cy was born in Lima.\n2: Ann was born in Rome.\nQuestion: Where was Ann born?\nCite:"
        " 2\nAnswer: Rome</s>"
    )
    # An answer over lines ends with EOS alone.
    assert prompts.stop_tokens == (TOKENIZER.eos_token_id,)
    # Whose token is whose: the numbers are part of their passages.
    (places,) = prompts.passage_places([example], [[2, 0]])
    first = len("1: Cy was born in Lima.\n")
    assert places[1 : 1 + first].tolist() == [0] * first and places[1 + first] == 1


def test_numbers_have_room_in_training():
    plain, cited = (
        Prompts(TOKENIZER, style, PASSAGES, EXAMPLES, max_answer_tokens=40).training_width(3)
        for style in (COMPACT, COMPACT_CITED)
    )
    assert cited - plain == 3 * len("1: ") + len("Question: \nCite:")


def test_a_number_after_the_text_is_refused():
    style = COMPACT_CITED._replace(passage="{text} [{number}]\n")
    with pytest.raises(ConfigError, match=r"needs its \{number\} before its \{text\}"):
        Prompts(TOKENIZER, style, PASSAGES, [])


def test_no_passage_of_a_known_context_is_cut():
    parts = toy_parts()
    texts = [Passage(str(i), "", "Cy was here.") for i in range(19)]
    texts.append(Passage("long", "", 5 * "Cy was everywhere. "))
    prompts = Prompts(TOKENIZER, COMPACT_CITED, texts, [], max_answer_tokens=40)
    contexts = {"a": Context(np.array([19, 3, 0]), (3,)), "b": Context(np.array([3, 4, 5]), (1,))}
    task = citing(parts.decoder, parts.params, parts.adapters, prompts, EXAMPLES[:2], contexts)
    table = task.table(EXAMPLES[:2])
    for tokens, length, example in zip(table["tokens"], table["lengths"], EXAMPLES, strict=False):
        prompt = prompts.prompt(example.question, contexts[example.id].rows)
        np.testing.assert_array_equal(tokens[0, : length[0]][: len(prompt)], prompt)


def slow_nll(prompts, question, rows, answer, reasoning):
    """One forward pass per token of the target."""
    parts, total = toy_parts(), 0.0
    written = [int(t) for t in prompts.prompt(question, rows)]
    for token in prompts.answer_tokens(answer, reasoning):
        tokens = np.zeros(160, np.int32)
        tokens[: len(written)] = written
        logits = np.asarray(parts.next_token(tokens, len(written)), np.float64)
        total -= logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        written.append(int(token))
    return total


def test_the_loss_is_that_of_citation_and_answer_alone():
    parts = toy_parts()
    prompts = Prompts(TOKENIZER, COMPACT_CITED, PASSAGES, EXAMPLES, max_answer_tokens=40)
    contexts = {
        "a": Context(np.array([1, 0, 3]), (2,)), "b": Context(np.array([1, 2, 0]), (1,)),
        "c": Context(np.array([3, 2, 1]), ()), "d": Context(np.array([2, 0, 3]), (1, 3)),
    }  # fmt: skip
    task = citing(parts.decoder, parts.params, parts.adapters, prompts, EXAMPLES, contexts)
    loss, _ = jax.jit(task.loss)(task.trainable, task.frozen, batch_of(task), KEY)
    targets = {
        "a": ("Rome", "2"),
        "b": ("Oslo", "1"),
        "c": ("unknown", "0"),
        "d": ("Bonn town", "1, 3"),
    }
    slow = [slow_nll(prompts, e.question, contexts[e.id].rows, *targets[e.id]) for e in EXAMPLES]
    np.testing.assert_allclose(loss, np.mean(slow), rtol=1e-4)
    assert task.trainable.keys() == {"adapters"}
    with pytest.raises(DataError, match="question 'b' and 2 others lack a context"):
        citing(parts.decoder, parts.params, parts.adapters, prompts, EXAMPLES, {"a": contexts["a"]})
    plain = Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES)
    with pytest.raises(ConfigError, match="to cite needs a prompt style"):
        citing(parts.decoder, parts.params, parts.adapters, plain, EXAMPLES, contexts)


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("2", (2,)), (" 3,1 ", (1, 3)), ("[1, 2]", (1, 2)), ("1, 1", (1,)), ("0", ()),
        ("4", None), ("0, 1", None), ("", None), ("two", None), ("1 and 2", None), ("-1", None),
    ],
)  # fmt: skip
def test_citations_are_read_strictly(text, numbers):
    assert cited(text, passages=3) == numbers


def test_citations_are_written_as_they_are_read():
    for numbers in ((1,), (1, 3), ()):
        assert cited(cite(numbers), 3) == numbers


def test_citation_scores_by_hand():
    named = [(1,), (1, 2, 3), (2,), None, (), (1, 2), (), (1,)]
    golds = [(1,), (1,), (1,), (1,), (1,), (1, 3), (), ()]
    found = citation_scores(named, golds)
    assert found["citation"].tolist() == [1, 1, 0, 0, 0, 1, 1, 0]
    np.testing.assert_allclose(found["citation_precision"], [1, 1 / 3, 0, 0, 0, 0.5, 1, 0])
    np.testing.assert_allclose(found["citation_recall"], [1, 1, 0, 0, 0, 0.5, 1, 0])
    np.testing.assert_allclose(found["citation_f1"], [1, 0.5, 0, 0, 0, 0.5, 1, 0])
    assert found["abstained"].tolist() == [0, 0, 0, 0, 1, 0, 1, 0]


def test_gold_passages_are_forced_in_place_of_the_last():
    retriever = toy_parts().retriever
    ranked, _ = retriever.search([e.question for e in EXAMPLES], 2)
    golds = [{0}, {1}, {0}, {3, 2}]
    contexts, hard = contexts_of(retriever, EXAMPLES, 2)
    found, again = contexts_of(retriever, EXAMPLES, 2, forced=False)
    np.testing.assert_array_equal(hard, again)
    assert hard.tolist() == [not {*r} & g for r, g in zip(ranked.tolist(), golds, strict=True)]
    assert 0 < hard.sum() < 4
    for i, (forced, own) in enumerate(zip(contexts, found, strict=True)):
        assert {*own.rows} == {*ranked[i]}
        kept = {*ranked[i][:1], *forced.rows[[c - 1 for c in forced.cites]]}
        assert {*forced.rows} == (kept if hard[i] else {*ranked[i]})
        assert [r in golds[i] for r in forced.rows] == [n + 1 in forced.cites for n in range(2)]
        assert bool(own.cites) != hard[i]
    for context, gold in zip(without_gold(retriever, EXAMPLES, 2), golds, strict=True):
        assert len(context.rows) == 2 and not {*context.rows} & gold and context.cites == ()


def test_a_copy_of_the_gold_passage_answers_as_well():
    parts = toy_parts()
    titles = [Passage(f"title{i}", f"Di {i}", "") for i in range(2)]  # not copies of each other
    texts = [*PASSAGES, Passage("copy", "", f"{PASSAGES[0].text} "), *titles]
    model = hub.Pretrained(parts.encoder, parts.query, TOKENIZER, "toy")
    retriever = Retriever.build(model, texts)
    asked = [EXAMPLES[0], Example("t", "Who is Di?", ("Di",), ("title0",))]
    copied, titled = without_gold(retriever, asked, 6)
    assert {*copied.rows.tolist()} == {1, 2, 3, 5, 6} and 6 in titled.rows and 5 not in titled.rows
    for n in (1, 2, 7):
        contexts, hard = contexts_of(retriever, asked, n)
        ranked, _ = retriever.search([e.question for e in asked], n)
        for context, nearest, golds, is_hard in zip(
            contexts, ranked, ({0, 4}, {5}), hard, strict=True
        ):
            assert is_hard == (not golds & {*nearest.tolist()})
            cited = [i + 1 for i, row in enumerate(context.rows) if row in golds]
            assert [*context.cites] == cited != []
    assert len(contexts[0].cites) == 2, "the passage and its copy"


def test_what_is_read_stays_within_a_pool():
    retriever, some = toy_parts().retriever, EXAMPLES[:2]
    pools = {EXAMPLES[0].id: np.array([0, 2]), EXAMPLES[1].id: np.array([1, 3])}

    def pool(example):
        return pools[example.id]

    contexts, hard = contexts_of(retriever, some, 2, pool=pool)
    assert [{*c.rows.tolist()} for c in contexts] == [{0, 2}, {1, 3}] and not hard.any()
    for context, gold in zip(without_gold(retriever, some, 2, pool=pool), (0, 1), strict=True):
        assert len(context.rows) == 1 and gold not in context.rows
        assert {*context.rows.tolist()} <= {0, 1, 2, 3} - {gold}


def test_a_system_answers_with_what_it_cites():
    """The built-in decoder was taught the format."""
    world = synthetic.generate()
    system = RAGSystem.build(world.passages[:60], prompt_style="compact_cited", top_k=2)
    asked = [e.question for e in world.test[:6]]
    responses = system.batch_query(asked)
    assert sum(len(r.cited) == 1 and r.cited[0] in r.sources for r in responses) >= 4
    rows, _ = system.retriever.search(asked, 2)
    readings = system.read(asked, rows)
    assert [r.answer for r in readings] == [r.answer for r in responses]
    assert all("Answer" not in r.answer and "\n" not in r.answer for r in readings)
    assert system.batch_query(asked[:1], mode="ensemble")[0].cited == ()
    own = [Example(f"q{i}", q, ("x",), (world.passages[i].id,)) for i, q in enumerate(asked)]
    contexts, _ = contexts_of(system.retriever, own, 2)
    scores = evaluate_citing(system, own, contexts)
    named = [cited(r.reasoning, 2) for r in system.read(asked, [c.rows for c in contexts])]
    expected = citation_scores(named, [c.cites for c in contexts])
    np.testing.assert_array_equal(scores["citation_f1"], expected["citation_f1"])
    told = []

    def judge(examples, texts, answers):
        told.append((texts, answers))
        return np.array([[1.0] * len(answers), [np.nan] * len(answers)])

    scores = evaluate_citing(system, own, contexts, judge)
    (texts, answers) = told[0]
    assert texts == [world.passages[i].text for i in range(6)] and len(answers) == 6
    assert scores["judged_0"].tolist() == [1.0] * 6 and np.isnan(scores["judged_1"]).all()
    plain = RAGSystem.build(world.passages[:60])
    with pytest.raises(ConfigError, match="to cite needs a prompt style"):
        evaluate_citing(plain, own, contexts)
