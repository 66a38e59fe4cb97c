"""The contexts of label-free fine-tuning: a text among the nearest others that do not answer."""

import json
import tracemalloc

import numpy as np
import pytest
from scripted import TEXTS
from toy_rag import TOKENIZER, toy_parts

from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.errors import ConfigError
from fedrag_jax.label_free import pipeline
from fedrag_jax.models import hub
from fedrag_jax.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def retriever():
    parts = toy_parts()
    model = hub.Pretrained(parts.encoder, parts.query, TOKENIZER, "toy")
    return Retriever.build(model, TEXTS)


EXAMPLES = [Example(f"e{i}", f"Where was Person {i}?", ("x",), (f"t{i}",)) for i in range(12)]


@pytest.mark.parametrize("negatives", ["top", "random"])
def test_contexts_hold_the_text_among_the_nearest_others(retriever, negatives, tmp_path):
    n = 4
    step = pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, n, negatives=negatives)
    cosines = retriever.embed_questions([e.question for e in EXAMPLES]) @ retriever.vectors.T
    left_out = 0
    for i, example in enumerate(EXAMPLES):
        rows, cites = step.kept[example.id]
        nearest = [r for r in np.lexsort((np.arange(12), -cosines[i])) if r != i]
        wrong = {*rows.tolist()} - {i}
        assert len(rows) == n and len(wrong) == n - 1
        assert wrong <= {*nearest[: n - (negatives == "top")]}
        left_out += wrong != {*nearest[: n - 1]}
        assert [rows[c - 1] for c in cites] == [i]
    assert (left_out > 0) == (negatives == "random")
    places = {c for context in step.kept.values() for c in context.cites}
    assert len(places) > 1  # the order tells nothing
    line = json.loads((tmp_path / "4_contexts.jsonl").read_text().splitlines()[0])
    assert line["passages"][line["cites"][0] - 1] == "t0"


def test_contexts_are_the_same_for_any_order_or_part_of_the_examples(retriever, tmp_path):
    how = {"negatives": "random", "unanswerable": 0.5}
    whole = pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, 4, **how).kept
    part = pipeline.add_hard_negatives(retriever, EXAMPLES[:3:-1], tmp_path, 4, **how).kept
    for i, context in part.items():
        np.testing.assert_array_equal(context.rows, whole[i].rows)
        assert context.cites == whole[i].cites
    hidden = [i for i, context in whole.items() if not context.cites]
    assert 0 < len(hidden) < len(whole)
    for i in hidden:
        assert len(whole[i].rows) == 4 and int(i[1:]) not in whole[i].rows


def test_a_copy_of_the_gold_passage_is_no_negative_of_it(tmp_path):
    parts = toy_parts()
    texts = [*TEXTS[:5], Passage("copy", "", TEXTS[0].text + " "), *TEXTS[5:]]
    model = hub.Pretrained(parts.encoder, parts.query, TOKENIZER, "toy")
    step = pipeline.add_hard_negatives(
        Retriever.build(model, texts), EXAMPLES, tmp_path, n=len(texts) - 2
    )
    assert 5 not in step.kept["e0"].rows and 5 in step.kept["e1"].rows


@pytest.mark.parametrize("how", [{}, {"negatives": "random"}, {"unanswerable": 1.0}])
def test_questions_may_have_several_gold_passages(retriever, how, tmp_path):
    """All the nearest passages are gold, and negatives are the next ones."""
    question, n = "Where were Person 3 and Person 4?", 3
    nearest = retriever.search([question], 12)[0][0]
    golds = nearest[:4]
    example = Example("e", question, ("x",), tuple(TEXTS[row].id for row in golds))
    step = pipeline.add_hard_negatives(retriever, [example], tmp_path, n, **how)
    rows, cites = step.kept["e"]
    assert {*rows.tolist()} <= {golds[0], *nearest[4 : 4 + n]} and len({*rows.tolist()}) == n
    assert [rows[c - 1] for c in cites] == ([] if "unanswerable" in how else [golds[0]])


def test_one_long_text_takes_no_memory_for_each_of_the_others(tmp_path):
    long = Passage("long", "", "word " * 100_000)
    parts, texts = toy_parts(), [*TEXTS, long, *(Passage(f"o{i}", "", str(i)) for i in range(40))]
    model = hub.Pretrained(parts.encoder, parts.query, TOKENIZER, "toy")
    retriever = Retriever.build(model, texts)
    pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, 4)  # compiles
    tracemalloc.start()
    pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, 4)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6


def test_contexts_stay_within_a_pool(retriever, tmp_path):
    def pool(example):
        return np.arange(int(example.id[1:]) % 2, 12, 2)

    step = pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, 5, pool=pool)
    for i, context in step.kept.items():
        assert {*context.rows.tolist()} <= {*pool(EXAMPLES[int(i[1:])]).tolist()}
    with pytest.raises(
        ConfigError, match="need 6 that are not gold, but question 'e0' has 5 among 6"
    ):
        pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, 7, pool=pool)


@pytest.mark.parametrize(
    "n, how, words",
    [
        (1, {}, "n >= 2"),
        (4, {"unanswerable": 2}, "unanswerable from 0 to 1"),
        (4, {"negatives": "hard"}, "negatives must be one of"),
        (12, {"negatives": "random"}, "need 12 that are not gold"),
    ],
)
def test_contexts_that_cannot_be_are_refused(retriever, n, how, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        pipeline.add_hard_negatives(retriever, EXAMPLES, tmp_path, n, **how)
