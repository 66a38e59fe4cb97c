"""RAFT against a slow version: what is in a prompt, what is scored, and where it must coincide."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from toy_rag import EXAMPLES, KEY, PASSAGES, TOKENIZER, batch_of, slow_log_probs, toy_parts

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.prompts import COMPACT, COMPACT_REASONED
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.stopping import held_out_loss
from fedrag_jax.objectives.generator import closed_book, concatenated
from fedrag_jax.objectives.raft import oracle, raft, raft_rows

CITIES = [Passage(f"c{i}", "", f"Person {i} lives in Town{i}.") for i in range(40)]
MANY = [
    Example(f"m{i}", f"Where is {i}?", (f"Town{i % 40}",), (f"c{i % 40}",), hops=1)
    for i in range(400)
] + [Example("two", "Where?", ("Town3",), ("c3", "c4"), hops=2)]
GOLDS = {e.id: {int(p[1:]) for p in e.positive_ids} for e in MANY}


@pytest.fixture(scope="module")
def parts():
    return toy_parts()


class Nearest:
    """A retriever whose ranking is the order of the corpus."""

    passages = CITIES

    def search(self, questions, k):
        return np.tile(np.arange(k), (len(questions), 1)), None


def with_oracle(rows):
    return np.mean([GOLDS[i] <= set(row.tolist()) for i, row in rows.items()])


def test_the_share_of_prompts_with_gold_passages_is_p():
    for share in (0.0, 0.3, 0.8, 1.0):
        rows = raft_rows(Nearest(), MANY, share)
        inside = with_oracle(rows)
        assert abs(inside - share) < (4 * np.sqrt(share * (1 - share) / 401) or 1e-9)
        for i, row in rows.items():
            assert len(set(row.tolist())) == 5  # no passage twice
            gold = GOLDS[i] & set(row.tolist())
            assert gold in (set(), GOLDS[i])


def test_golds_are_never_distractors_and_stand_anywhere():
    for hard in (False, True):
        rows = raft_rows(Nearest(), MANY, 0.0, hard=hard)
        assert not any(GOLDS[i] & set(row.tolist()) for i, row in rows.items())
    rows = raft_rows(Nearest(), MANY, 1.0)
    places = [row.tolist().index(min(GOLDS[i])) for i, row in rows.items()]
    assert np.bincount(places, minlength=5).min() > 40
    drawn = np.concatenate([[r for r in row if r not in GOLDS[i]] for i, row in rows.items()])
    assert np.bincount(drawn, minlength=40).min() > 20  # of 1,600 draws, 40 each


def test_prompts_are_the_same_for_any_order_or_part_of_the_examples():
    for hard in (False, True):
        rows = raft_rows(Nearest(), MANY, hard=hard, seed=3)
        again = raft_rows(Nearest(), MANY[:150:-1], hard=hard, seed=3)
        for name, row in again.items():
            np.testing.assert_array_equal(row, rows[name])
    other = raft_rows(Nearest(), MANY, hard=True, seed=4)
    assert any((other[i] != rows[i]).any() for i in rows)


def test_a_larger_share_adds_gold_passages_and_changes_no_other_prompt():
    less, more = (raft_rows(Nearest(), MANY, share) for share in (0.4, 0.7))
    changed = [i for i in less if (less[i] != more[i]).any()]
    assert 0.2 < len(changed) / len(MANY) < 0.4
    assert all(GOLDS[i] <= set(more[i].tolist()) and not GOLDS[i] & set(less[i]) for i in changed)


def test_hard_distractors_are_the_nearest_that_tell_no_answer():
    questions = [
        Example("a", "?", ("town3", "TOWN5"), ("c0",)),
        Example("b", "?", ("Town",), ("c1", "c2")),  # part of every town's name, no word of its own
        Example("c", "?", ("lives",), ("c1",)),
    ]
    rows = raft_rows(Nearest(), questions[:2], 1.0, 3, hard=True)
    assert {i: sorted(row.tolist()) for i, row in rows.items()} == {
        "a": [0, 1, 2, 4],
        "b": [0, 1, 2, 3],
    }
    with pytest.raises(DataError, match=r"'c' needs 3 distractors, but the corpus has 0"):
        raft_rows(Nearest(), questions, 1.0, 3, hard=True)


def test_a_title_tells_an_answer_too():
    nearest = Nearest()
    nearest.passages = [CITIES[0], Passage("t", "Rome", "A city on a river."), *CITIES[1:3]]
    rows = raft_rows(nearest, [Example("a", "?", ("Rome",), ("c0",))], 1.0, 2, hard=True)
    assert sorted(rows["a"].tolist()) == [0, 2, 3]


@pytest.mark.parametrize("hard", [False, True])
def test_gold_passages_alone_need_no_others(hard):
    nearest = Nearest()
    for golds in (("c0",), ("c0", "c1")):
        nearest.passages = CITIES[: len(golds)]
        rows = raft_rows(nearest, [Example("a", "?", ("x",), golds)], 1.0, 0, hard=hard)
        assert sorted(rows["a"].tolist()) == [*range(len(golds))]


def test_what_cannot_be_is_refused(parts):
    network = parts.decoder, parts.params, parts.adapters
    for options, words in (
        ({"oracle_share": 1.2}, "oracle_share must be between 0 and 1, got 1.2"),
        ({"distractors": -1}, "distractors must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            raft_rows(Nearest(), MANY, **options)
    with pytest.raises(DataError, match=r"'m0' needs 40 distractors, but the corpus has 39"):
        raft_rows(Nearest(), MANY[:1], distractors=40)
    bare = dataclasses.replace(MANY[0], id="bare", positive_ids=())
    with pytest.raises(
        DataError, match=r"1 questions name no gold passage, 'bare' first: .* give them"
    ):
        raft_rows(Nearest(), [MANY[0], bare])
    with pytest.raises(ConfigError, match="no mark between reasoning and final answer"):
        raft(
            *network, parts.prompts, parts.retriever, EXAMPLES,
            distractors=1, teacher=lambda e, _: "It says so.",
        )  # fmt: skip


@pytest.mark.parametrize("make", [oracle, functools.partial(raft, distractors=1, oracle_share=1.0)])
def test_held_out_questions_are_read_in_widths_of_their_own(parts, make):
    """They have more gold passages and longer questions, and training does not notice."""
    prompts = Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES[:2])
    options = {} if make is oracle else {"teacher": None}
    task = make(
        parts.decoder,
        parts.params,
        parts.adapters,
        prompts,
        parts.retriever,
        EXAMPLES[:2],
        **options,
    )
    before = task.collate(EXAMPLES[:2], None)
    long = Example(
        "v", "Where on this wide earth was the good old Bob born?", ("Oslo Norway",), ("p1",)
    )
    held_out = [EXAMPLES[3], long]
    table = task.collate(held_out, None)
    for row, example in zip(table["tokens"], held_out, strict=True):
        read = "".join(TOKENIZER.convert_ids_to_tokens(row[0])).replace(" ", "")
        shown = [PASSAGES[int(p[1])].text for p in example.positive_ids]
        for text in (example.question, example.answer, *shown):
            assert text.replace(" ", "") in read
    assert held_out_loss(task, held_out)(task.trainable) > 0
    jax.tree.map(np.testing.assert_array_equal, task.collate(EXAMPLES[:2], None), before)


def quoting(example, passages):
    """A teacher that quotes."""
    assert [p.id for p in passages] == list(example.positive_ids)
    return f'"{passages[0].text}"\nSo'


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [None, quoting])
def test_loss_against_numpy(parts, teacher):
    """All that is scored is the target; the prompt's passages are those drawn, in their order."""
    prompts = Prompts(TOKENIZER, COMPACT_REASONED, PASSAGES, EXAMPLES, max_answer_tokens=80)
    parts = type(parts)(**vars(parts) | {"prompts": prompts})
    network = parts.decoder, parts.params, parts.adapters
    task = raft(
        *network, prompts, parts.retriever, EXAMPLES,
        distractors=1, oracle_share=0.5, teacher=teacher,
    )  # fmt: skip
    rows = raft_rows(parts.retriever, EXAMPLES, 0.5, 1)
    slow = []
    for e in EXAMPLES:
        target = e.answers[0]
        if teacher:
            quote = PASSAGES[int(e.positive_ids[0][1])].text
            target = f'"{quote}" SoAnswer: {target}'
        slow.append(-slow_log_probs(parts, e.question, rows[e.id], target).sum())
    batch = batch_of(task)
    scored = [
        TOKENIZER.decode(row[0][places[0][mask > 0]]).replace(" ", "")
        for row, places, mask in zip(
            batch["tokens"], batch["answer_positions"], batch["answer_mask"], strict=True
        )
    ]
    assert all(
        s.endswith(e.answers[0].replace(" ", "") + "</s>")
        for s, e in zip(scored, EXAMPLES, strict=True)
    )
    loss, _ = task.loss(task.trainable, task.frozen, batch, KEY)
    np.testing.assert_allclose(loss, np.mean(slow), rtol=1e-4)


def test_without_distractors_and_reasoning_it_is_training_on_the_gold_passages(parts):
    network = parts.decoder, parts.params, parts.adapters
    one = [e for e in EXAMPLES if len(e.positive_ids) == 1]
    golds = {e.id: [int(e.positive_ids[0][1:])] for e in one}
    plain = concatenated(*network, parts.prompts, lambda es: np.array([golds[e.id] for e in es]))
    expected = plain.collate(one, None)
    for task in (
        oracle(*network, parts.prompts, parts.retriever, one),
        raft(
            *network, parts.prompts, parts.retriever, one,
            oracle_share=1.0, distractors=0, teacher=None,
        ),
    ):  # fmt: skip
        assert task.loss == plain.loss
        jax.tree.map(np.testing.assert_array_equal, task.collate(one, None), expected)
    # With gold passages of two counts in one table, none is lost and none is added.
    rows = raft_rows(parts.retriever, EXAMPLES, 1.0, 0)
    assert [set(rows[e.id]) - {-1} for e in EXAMPLES] == [{0}, {1}, {0}, {2, 3}]
    table = oracle(*network, parts.prompts, parts.retriever, EXAMPLES).collate(EXAMPLES, None)
    for i, e in enumerate(EXAMPLES):
        prompt = parts.prompts.prompt(e.question, [r for r in rows[e.id] if r >= 0])
        np.testing.assert_array_equal(table["tokens"][i, 0, : len(prompt)], prompt)


def test_closed_book_reads_the_question_alone(parts):
    task = closed_book(parts.decoder, parts.params, parts.adapters, parts.prompts)
    batch = batch_of(task)
    assert batch["tokens"].shape == (4, 1, parts.prompts.training_width(0))
    loss, _ = task.loss(task.trainable, task.frozen, batch, KEY)
    slow = [-slow_log_probs(parts, e.question, [], e.answers[0]).sum() for e in EXAMPLES]
    np.testing.assert_allclose(loss, np.mean(slow), rtol=1e-4)


def test_long_reasoning_is_cut_and_the_answer_stays():
    prompts = Prompts(TOKENIZER, COMPACT_REASONED, PASSAGES, EXAMPLES, max_answer_tokens=20)
    tokens = prompts.answer_tokens("Rome", "Ann was\nborn in Rome, they say.")
    assert len(tokens) == 20
    assert "".join(TOKENIZER.convert_ids_to_tokens(tokens)) == " Ann waAnswer: Rome</s>"
    assert len(prompts.answer_tokens("Rome" * 9)) == 20
    np.testing.assert_array_equal(
        prompts.answer_tokens("Rome", " \n"), prompts.answer_tokens("Rome")
    )
    short = Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES)
    assert len(short.answer_tokens("Rome" * 9)) == short.max_answer_tokens == 16
    with pytest.raises(ConfigError, match="max_answer_tokens must be at least 2, got 1"):
        Prompts(TOKENIZER, COMPACT, PASSAGES, [], max_answer_tokens=1)
