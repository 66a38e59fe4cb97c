"""A system on benchmarks: what is chosen, written and ranked, with examples before it or without."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from asked import ASKED, PASSAGES
from tiny import logits

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.data.prompts import INSTRUCT
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.benchmarks import asking, results, sets
from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import Found

# --- choices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["likelihood", "letters"])
def test_the_likelihood_of_a_choice_is_that_of_its_tokens_one_by_one(system, run, by):
    result = run("mmlu", limit=1, corpus="gold", by=by)
    (row,) = result.rows
    (example,) = [e for e in ASKED if e.id == row["id"]]
    (passage,) = [p for p in PASSAGES if p.id in example.positive_ids]
    assert row["read"] == [passage.id]
    tokenizer = system.prompts.tokenizer
    choices = next(
        json.loads(line)["choices"]
        for line in pathlib.Path(result.origin["source"]).read_text().splitlines()
        if json.loads(line)["id"] == row["id"]
    )
    prompt = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    prompt += tokenizer(f"{passage.text}\n", add_special_tokens=False)["input_ids"]
    asked = example.question
    if by == "letters":
        asked += "".join(f"\n{x}. {c}" for x, c in zip("ABCD", choices, strict=True))
        choices = "ABCD"
    prompt += tokenizer(asked, add_special_tokens=False)["input_ids"]
    right = int(np.argmax(row["log_probs"])) == row["gold"]
    assert row["scores"]["accuracy"] == float(right)
    mean = [x / len(c) for x, c in zip(row["log_probs"], choices, strict=True)]  # all is ASCII
    assert row["scores"]["accuracy_per_byte"] == float(int(np.argmax(mean)) == row["gold"])
    for choice, log_prob, length in zip(choices, row["log_probs"], row["tokens"], strict=True):
        answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(prompt + answer)] = prompt + answer
        index = np.arange(96)[None]
        seen = index < len(prompt + answer)
        found = logits(system.decoder, system.generator.params, tokens, index, seen)
        chances = np.asarray(jax.nn.log_softmax(found.astype("float32"))[0], np.float64)
        slow = sum(chances[len(prompt) + i - 1, t] for i, t in enumerate(answer))
        assert length == len(answer) and math.isclose(log_prob, slow, rel_tol=1e-3, abs_tol=1e-3)


def test_who_reads_the_answer_chooses_it_and_who_does_not_guesses(run):
    told, untold = (run("mmlu", corpus=corpus, by="likelihood") for corpus in ("gold", "none"))
    assert told.n == 24 and told.metrics["accuracy"].mean >= 90
    assert untold.metrics["accuracy"].mean <= 60
    assert all(row["read"] == [] for row in untold.rows) and "mrr" not in untold.metrics
    assert {row["group"] for row in told.rows} == {"topic 0", "topic 1"}


def test_what_is_written_and_not_a_letter_counts_as_wrong_and_is_told(run):
    assert run("mmlu", limit=1).settings["by"] == "letters"  # as MMLU's authors choose
    result = run("mmlu", limit=4, corpus="gold", by="generation")
    for row in result.rows:
        unparsable = row["prediction"] is None
        assert row["scores"] == {
            "accuracy": float(row["prediction"] == row["gold"]), "unparsable": float(unparsable)
        }  # fmt: skip
    assert result.metrics["unparsable"].mean > 0  # the built-in decoder knows no letters


# --- open answers and rankings ---------------------------------------------------------------------


def test_passages_of_the_set_are_searched_ranked_and_read(run):
    found = run("squad", limit=12, corpus="benchmark")
    gold = run("squad", limit=12, corpus="gold")
    assert found.metrics["mrr"].n == 12 and found.metrics["recall_at_5"].mean > 60
    assert gold.metrics["em"].mean > 60 and "mrr" not in gold.metrics
    for row in found.rows:
        (example,) = [e for e in ASKED if e.id == row["id"]]
        right = row["read"] == [*example.positive_ids]
        assert right <= row["scores"]["answer_in_passages"]
        assert (row["scores"]["mrr"] == 1.0) == right
    # A corpus of its own that lacks the gold passages says nothing of how well it is ranked.
    other = RAGSystem.build([Passage("other", "", "Nothing.")], top_k=1)
    with pytest.warns(UserWarning, match="24 of 24 positive_ids name none of the 1 passages"):
        elsewhere = run("squad", limit=2, using=other)
    assert elsewhere.metrics["mrr"].n == 0 and elsewhere.rows[0]["read"] == ["other"]
    assert "–" in results.table([elsewhere])


class Elsewhere:
    """Somebody who is asked in words and does not list what there is."""

    kind, dimension, cosines = "elsewhere", None, False

    def description(self):
        return {"kind": self.kind}

    def search(self, questions, vectors=None, k=5):
        return [[Found(p, 1.0) for p in PASSAGES[:k]] for _ in questions]


def test_passages_that_nobody_lists_are_read_and_not_ranked(system, run):
    result = run("squad", limit=2, using=system.over(Elsewhere()))
    assert [row["read"] for row in result.rows] == 2 * [[PASSAGES[0].id]]
    assert result.metrics["mrr"].n == 0 and result.metrics["answer_in_passages"].n == 2
    assert result.system["corpus"] == "not listed"


def test_batches_and_larger_samples_answer_the_same(run):
    def answers(result):
        return {row["id"]: (row["prediction"], row["scores"]) for row in result.rows}

    ten, one_by_one = run("squad", limit=10), run("squad", limit=10, batch_size=3)
    assert answers(ten) == answers(one_by_one)
    six = run("squad", limit=6)
    assert [r["id"] for r in six.rows] == [r["id"] for r in ten.rows][:6]
    assert {r["id"] for r in run("squad", limit=6, seed=1).rows} != {r["id"] for r in six.rows}
    left_out = {row["id"] for row in six.rows}
    assert not left_out & {row["id"] for row in run("squad", limit=4, exclude=left_out).rows}


def test_own_questions_may_be_unanswerable(system, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"id": e.id, "question": e.question, "answers": e.answers} for e in ASKED[:4]]

    def result():
        path.write_text("\n".join(map(json.dumps, rows)))
        return Benchmarker(system, progress=False).run(sets.own(path, True), source=path)

    assert "answerable_em" not in result().metrics
    rows[:2] = [
        {"id": row["id"], "question": row["question"], "unanswerable": True} for row in rows[:2]
    ]
    found = result()
    assert [found.metrics[f"{n}answerable_em"].n for n in ("", "un")] == [2, 2]
    for row in found.rows:
        if row["id"] in (rows[0]["id"], rows[1]["id"]):
            assert row["gold"] == [] and row["scores"]["em"] == row["scores"]["abstained"]
    rows[0] = rows[3] | {"id": "blank", "answers": [" "]}
    with pytest.raises(
        DataError, match=r"own.jsonl:1: question 'blank' has no answer; give at least"
    ):
        result()


# --- examples --------------------------------------------------------------------------------------


def test_examples_stand_before_what_is_read(system, run):
    shown = [Question("a", "Where is <s>Ann?", ("Rome",)), Question("b", "Who left?", ())]
    after = asking.after_examples(system, shown, "open", "generation").prompts
    text = after.tokenizer.decode(after.prompt("Why?", [PASSAGES[0]]), skip_special_tokens=True)
    assert text == (f"Where is < s>Ann? Rome\nWho left? unanswerable\n{PASSAGES[0].text}\nWhy?")
    style = asking.showing(INSTRUCT, system.prompts.tokenizer, [("Why?", "So.")])
    before, heading, _ = style.opening.partition("### Context:\n")
    assert (
        before.endswith("words as possible.\n### Question:\nWhy?\n### Answer:\nSo.\n\n") and heading
    )
    chat = INSTRUCT._replace(end="<|end|>", question="{question}<|end|>")
    assert (
        asking.showing(chat, system.prompts.tokenizer, [("Why?", "So.")]).opening == style.opening
    )
    # Both groups have their own, and likelihoods after them are others.
    bare, after = run("mmlu", limit=4), run("mmlu", limit=4, shots=2)
    assert [r["log_probs"] for r in bare.rows] != [r["log_probs"] for r in after.rows]


def test_what_does_not_fit_is_cut_and_told(system, run):
    def tokens(text):
        return len(system.prompts.question_tokens(text))

    question = " ".join(e.question for e in ASKED[:5])
    kept = asking.fitted(system.prompts, question, 20)
    before = question.removesuffix(kept).split()[-1]
    assert question.endswith(kept) and tokens(kept) <= 20 < tokens(f"{before} {kept}")
    assert asking.fitted(system.prompts, kept, 20) == kept
    config = dataclasses.replace(system.decoder.config, max_positions=40)
    small = dataclasses.replace(system, decoder=dataclasses.replace(system.decoder, config=config))
    assert run("squad", limit=3, using=small).share_cut == 1.0
    assert run("squad", limit=3).share_cut == 0.0


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, how, words",
    [("squad", {"by": "likelihood"}, r"by must be one of \['generation'\] for squad"),
     ("mmlu", {"corpus": "all"}, "corpus must be one of"), ("mmlu", {"limit": 0}, "limit must be at"),
     ("mmlu", {"shots": -1}, "shots must be at least 0"),
     ("mmlu", {"mode": "ensemble"}, "mode and beams cannot be chosen"),
     ("scifact", {"corpus": "none"}, "asks for a ranking"),
     ("squad", {"exclude": [e.id for e in ASKED]}, "exclude leaves no question"),
     ("squad", {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
     ("mmlu", {"max_new_tokens": 3}, "by 'letters' writes no answer of mmlu: leave out max")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(run, name, how, words):
    with pytest.raises(ConfigError, match=words):
        run(name, **how)


def test_choices_are_scored_without_reasoning(run):
    reasons = RAGSystem.build(PASSAGES, top_k=1, prompt_style="compact_reasoned")
    with pytest.raises(ConfigError, match="likelihood scores answers only"):
        run("mmlu", using=reasons)
    with pytest.raises(ConfigError, match="examples have no reasoning"):
        run("squad", using=reasons, shots=1, limit=1)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        Benchmarker(reasons, batch_size=0)
