"""Prompts of benchmark questions: wording, few-shot examples, and truncation."""

import bisect
import dataclasses
import re
import string
from collections.abc import Sequence

from fedrag_jax.data.answers import comparable, normalize_answer
from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.hub_rows import Question
from fedrag_jax.data.prompts import INSTRUCT, PromptStyle, plain
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.metrics import abstained
from fedrag_jax.rag import RAGSystem

LETTERED = ("generation", "letters")  # ways to answer that see choices by their letters
UNANSWERABLE = "unanswerable"  # what an example shows that has no answer
_HEADING = re.compile(r"(?:^|(?<=\n))#+ [^\n]*\n\Z")


def words(question: Question, kind: str, by: str) -> str:
    """Returns the question text: with the choices if one is to be named, and without them if each
    choice is scored as a continuation."""
    if by not in LETTERED or kind == "open":
        return question.question
    if kind == "labels":
        *some, last = question.choices
        return f"{question.question}\nAnswer {', '.join(some)} or {last}."
    listed = [
        f"{letter}. {c}" for letter, c in zip(_letters(question), question.choices, strict=True)
    ]
    told = ["Answer with the letter alone."] if by == "generation" else []
    return "\n".join([question.question, *listed, *told])


def continuations(question: Question, by: str) -> Sequence[str]:
    """Returns the scored continuations: the text of each choice, or its letter."""
    return [*_letters(question)] if by == "letters" else question.choices


def right(question: Question, kind: str, by: str) -> str:
    """Returns the correct answer to write."""
    if kind == "open":
        return next(filter(str.strip, question.answers), UNANSWERABLE)
    by_letter = kind == "choices" and by in LETTERED
    return (_letters(question) if by_letter else question.choices)[question.label]


def parsed(answer: str, question: Question, kind: str) -> int | None:
    """Returns the choice that an answer names, parsed strictly; None for none.

    A letter must stand alone, possibly in brackets or before a full stop, or be followed by the exact
    words of its choice. A label is the answer's first word.
    """
    if kind == "labels":
        first = normalize_answer(answer).partition(" ")[0]
        if first not in question.choices or abstained([answer]).any():  # "no answer" is not "no"
            return None
        return question.choices.index(first)
    letters = "".join(_letters(question))
    found = re.fullmatch(rf"\(?([{letters}])\)?[.:]?(?:\s+(.*))?", answer.strip(), re.DOTALL)
    if found is None:
        return None
    named = letters.index(found[1])
    said = comparable(found[2] or "")
    return named if said in ("", comparable(question.choices[named])) else None


def _letters(question: Question) -> str:
    return string.ascii_uppercase[: len(question.choices)]


# --- examples --------------------------------------------------------------------------------------


def set_aside(asked: Sequence[Question], shots: int) -> tuple[list[Question], list[Question]]:
    """Splits a data set with only one split into few-shot examples and asked questions: a hundredth is
    set aside, or as many as are shown if that is more; the same for all seeds."""
    order = sorted(asked, key=lambda q: stream(0, f"set aside {q.id}").random())
    n = max(shots, len(asked) // 100)
    shown = {q.id for q in order[:n]}
    return order[:n], [q for q in asked if q.id not in shown]


def examples_for(
    question: Question, shown: Sequence[Question], shots: int, seed: int
) -> tuple[Question, ...]:
    """Draws `shots` examples from the question's group by the seed, without the question itself.

    Raises:
      ConfigError: the group has too few examples.
    """
    if not shots:
        return ()
    asked = comparable(question.question)
    same = [q for q in shown if q.group == question.group]
    drawn = (same[i] for i in stream(seed, f"shots {question.group}").permutation(len(same)))
    others = [q for q in drawn if q.id != question.id and comparable(q.question) != asked]
    if len(others) < shots:
        group = f" of {question.group!r}" if question.group else ""
        raise ConfigError(
            f"shots must be at most {len(others)}, the examples{group} for question {question.id!r}; "
            f"got {shots}"
        )
    return tuple(others[:shots])


def after_examples(
    system: RAGSystem, examples: Sequence[Question], kind: str, by: str
) -> RAGSystem:
    """Returns the system with few-shot examples (without passages) before the passages of a prompt."""
    if not examples:
        return system
    prompts = system.prompts
    shown = [(words(q, kind, by), right(q, kind, by)) for q in examples]
    style = showing(prompts.style, prompts.tokenizer, shown)
    # Passages come as they are, not as rows: no corpus has to be tokenised once more.
    longest = prompts.max_passage_tokens, prompts.max_answer_tokens
    return dataclasses.replace(system, prompts=Prompts(prompts.tokenizer, style, (), (), *longest))


def showing(style: PromptStyle, tokenizer, shown: Sequence[tuple[str, str]]) -> PromptStyle:
    """Returns the style with examples at the end of its opening, before the heading of the passages.

    Args:
      shown: questions, each with its answer.

    Raises:
      ConfigError: a style whose answers come after reasoning or citations.
    """
    if style.final:
        raise ConfigError(
            "examples have no reasoning or citations, but the prompt style needs them: use shots=0, or "
            "a style without them"
        )
    # In a chat, examples are part of the user's turn, and a question's own form would end that.
    form = INSTRUCT if style.end else style
    template = form.question + form.answer + "\n" * (1 + form.question.endswith("\n"))
    texts = [
        template.format(question=plain(tokenizer, q), answer=plain(tokenizer, a)) for q, a in shown
    ]
    heading = _HEADING.search(style.opening)
    place = heading.start() if heading else len(style.opening)
    opening = style.opening[:place] + "".join(texts) + style.opening[place:]
    return style._replace(opening=opening)


# --- room ------------------------------------------------------------------------------------------


def fitted(prompts: Prompts, text: str, room: int) -> str:
    """Returns the question, or as many of its last words as fit into `room` tokens."""
    if len(prompts.question_tokens(text)) <= room:
        return text
    parts = text.split(" ")
    fits = bisect.bisect_left(
        range(len(parts)), True,
        key=lambda i: len(prompts.question_tokens(" ".join(parts[i:]))) <= room,
    )  # fmt: skip
    return " ".join(parts[fits:])
