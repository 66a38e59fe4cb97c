"""Converts a row of each public data set, in the hub's columns, to a question and its passages."""

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
    """One question of a public data set with its labels.

    Attributes:
      answers: acceptable alternatives; empty if the passages do not answer it (SQuAD v2).
      choices: the choices of a multiple-choice question; empty for open questions.
      label: position of the correct choice, from 0; None if unknown.
      golds: ids of the gold passages; empty if not labelled.
      group: the group whose questions may be few-shot examples; "" for any.
      titles: titles of the pages with the answer, for finding it in another corpus; empty if unknown.
      topic: the label by which clients differ; "" if unknown.
      hops: number of passages that must be read together.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    label: int | None = None
    golds: tuple[str, ...] = ()
    group: str = ""
    titles: tuple[str, ...] = ()
    topic: str = ""
    hops: int = 1


Read = tuple[Question, list[Passage]]


def mmlu(row: Row, place: str) -> Read:
    """{question, subject, choices, answer}"""
    label = int(row["answer"])
    choices = tuple(row["choices"])
    return Question(place, row["question"], (), choices, label, group=row["subject"]), []


def hellaswag(row: Row, place: str) -> Read:
    """{activity_label, ctx_a, ctx_b, endings, label}, cleaned as usual: without the brackets of
    WikiHow's markup."""
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = tuple(_unbracketed(ending) for ending in row["endings"])
    label = int(row["label"]) if str(row["label"]) else None
    return Question(place, _unbracketed(begun), (), endings, label), []


def _unbracketed(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return " ".join(text.split())


def boolq(row: Row, place: str) -> Read:
    """{question, answer: bool, passage}; questions are in lower case and without a question mark."""
    passage = passage_of("", row["passage"])
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
    """{question_id, question, answer: {value, aliases}}; the hidden answers of the test are "<unk>".

    With `entity_pages: {title, wiki_context}` the pages of Wikipedia that belong to it.
    """
    answers = dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])
    answers.pop("<unk>", None)
    pages = row.get("entity_pages") or {"title": [], "wiki_context": []}
    both = zip(pages["title"], pages["wiki_context"], strict=True)
    passages = [passage_of(title, text) for title, text in both if text]
    about = {"golds": tuple(p.id for p in passages), "titles": tuple(pages["title"])}
    answers = tuple(a for a in answers if a)
    return Question(row["question_id"], row["question"], answers, **about), passages


def popqa(row: Row, place: str) -> Read:
    """{id, prop, question, possible_answers: a JSON list} and, where known, s_wiki_title"""
    about = {"topic": row.get("prop", ""), "titles": tuple(filter(None, [row.get("s_wiki_title")]))}
    answers = tuple(json.loads(row["possible_answers"]))
    return Question(str(row["id"]), row["question"], answers, **about), []


def hotpotqa(row: Row, place: str) -> Read:
    """{id, question, answer, supporting_facts: {title}, context: {title, sentences}}"""
    context = row["context"]
    passages = [
        passage_of(title, "".join(sentences).strip())
        for title, sentences in zip(context["title"], context["sentences"], strict=True)
    ]
    told = {*row["supporting_facts"]["title"]}
    read = [p for p in passages if p.title in told]
    answers = (row["answer"],) if row["answer"] else ()
    about = {"golds": tuple(p.id for p in read), "titles": tuple(p.title for p in read)}
    return Question(row["id"], row["question"], answers, hops=max(len(read), 1), **about), passages


def musique(row: Row, place: str) -> Read:
    """{id, question, answer, answer_aliases, paragraphs: {title, paragraph_text, is_supporting}}; ids
    begin with the number of hops ("2hop__")."""
    passages, read = [], []
    for paragraph in row["paragraphs"]:
        passages.append(passage_of(paragraph["title"], paragraph["paragraph_text"]))
        if paragraph["is_supporting"]:
            read.append(passages[-1])
    answers = tuple(dict.fromkeys(filter(None, [row["answer"], *row["answer_aliases"]])))
    about = {"golds": tuple(p.id for p in read), "titles": tuple(p.title for p in read)}
    return Question(row["id"], row["question"], answers, hops=int(row["id"][0]), **about), passages


def squad(row: Row, place: str) -> Read:
    """{id, title, context, question, answers: {text}}, of both versions."""
    passage = passage_of(row["title"].replace("_", " "), row["context"])
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    about = {"golds": (passage.id,), "titles": (passage.title,), "topic": passage.title}
    return Question(row["id"], row["question"].strip(), answers, **about), [passage]


def xquad(row: Row, place: str) -> Read:
    """{id, context, question, answers: {text}}; the same ids in each language."""
    return squad({**row, "title": ""}, place)


def beir_query(row: Row, place: str) -> Read:
    """{_id, text}; `golds` is filled in from the qrels."""
    return Question(str(row["_id"]), row["text"]), []


def beir_document(row: Row) -> Passage:
    """{_id, title, text}"""
    return Passage(str(row["_id"]), row["title"], row["text"])


def passage_of(title: str, text: str) -> Passage:
    """Returns a passage without an id on the hub; its id is computed from the text."""
    name = hashlib.sha256(json.dumps([title, text]).encode()).hexdigest()[:16]
    return Passage(name, title, text)
