"""One row of each public set, in the hub's own columns, as a question and the passages with it."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fedrag_jax.data.examples import Passage

Row = Mapping[str, Any]
YES_NO = ("yes", "no")
YES_NO_MAYBE = ("yes", "no", "maybe")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark, and what is right.

    Attributes:
      answers: acceptable alternatives; none where its passages do not tell (SQuAD v2).
      choices: of which one is right; none for open questions.
      label: the place of that one, from 0; None where nobody told.
      golds: ids of the passages that hold the answer; none where nobody labelled them.
      group: whose questions may be shown as examples; "" if anybody's.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    label: int | None = None
    golds: tuple[str, ...] = ()
    group: str = ""


Read = tuple[Question, list[Passage]]


def mmlu(row: Row, place: str) -> Read:
    """{question, subject, choices, answer}"""
    label = int(row["answer"])
    choices = tuple(row["choices"])
    return Question(place, row["question"], (), choices, label, group=row["subject"]), []


def hellaswag(row: Row, place: str) -> Read:
    """{activity_label, ctx_a, ctx_b, endings, label}, cleaned as the paper's followers do: without the
    brackets that WikiHow's markup left."""
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = tuple(_unbracketed(ending) for ending in row["endings"])
    label = int(row["label"]) if str(row["label"]) else None
    return Question(place, _unbracketed(begun), (), endings, label), []


def _unbracketed(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return " ".join(text.split())


def boolq(row: Row, place: str) -> Read:
    """{question, answer: bool, passage}; questions are in lower case and without their mark."""
    passage = _passage("", row["passage"])
    question = row["question"][:1].upper() + row["question"][1:].rstrip("?") + "?"
    label = None if row["answer"] is None else int(not row["answer"])
    return Question(place, question, (), YES_NO, label, (passage.id,)), [passage]


def pubmedqa(row: Row, place: str) -> Read:
    """{pubid, question, context: {contexts}, final_decision}; an abstract without its conclusion."""
    passage = Passage(f"pubmed-{row['pubid']}", "", " ".join(row["context"]["contexts"]))
    label = YES_NO_MAYBE.index(row["final_decision"])
    asked = Question(str(row["pubid"]), row["question"], (), YES_NO_MAYBE, label, (passage.id,))
    return asked, [passage]


def nq(row: Row, place: str) -> Read:
    """{question, answer: [str]}"""
    return Question(place, row["question"], tuple(row["answer"])), []


def triviaqa(row: Row, place: str) -> Read:
    """{question_id, question, answer: {value, aliases}}; the hidden answers of the test are "<unk>"."""
    answers = dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])
    answers.pop("<unk>", None)
    return Question(row["question_id"], row["question"], tuple(a for a in answers if a)), []


def popqa(row: Row, place: str) -> Read:
    """{id, question, possible_answers: a JSON list}"""
    return Question(str(row["id"]), row["question"], tuple(json.loads(row["possible_answers"]))), []


def hotpotqa(row: Row, place: str) -> Read:
    """{id, question, answer, supporting_facts: {title}, context: {title, sentences}}"""
    context = row["context"]
    passages = [
        _passage(title, "".join(sentences).strip())
        for title, sentences in zip(context["title"], context["sentences"], strict=True)
    ]
    told = {*row["supporting_facts"]["title"]}
    golds = tuple(p.id for p in passages if p.title in told)
    answers = (row["answer"],) if row["answer"] else ()
    return Question(row["id"], row["question"], answers, golds=golds), passages


def squad(row: Row, place: str) -> Read:
    """{id, title, context, question, answers: {text}}, of both versions."""
    passage = _passage(row["title"].replace("_", " "), row["context"])
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    question = row["question"].strip()
    return Question(row["id"], question, answers, golds=(passage.id,)), [passage]


def beir_query(row: Row, place: str) -> Read:
    """{_id, text}; `golds` is filled in from the qrels."""
    return Question(str(row["_id"]), row["text"]), []


def beir_document(row: Row) -> Passage:
    """{_id, title, text}"""
    return Passage(str(row["_id"]), row["title"], row["text"])


def _passage(title: str, text: str) -> Passage:
    """A passage that the hub gives no id: the same text always has the same."""
    name = hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()[:16]
    return Passage(name, title, text)
