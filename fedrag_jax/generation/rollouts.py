"""Rollouts of a model that searches while it writes: parts, queries, answer and format."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.data.examples import require_whole
from fedrag_jax.data.prompts import COMPACT, PromptStyle, plain, turns
from fedrag_jax.errors import ConfigError


class Tags(NamedTuple):
    """The tags of a rollout's parts; an opening and a closing tag for each but `think`.

    Attributes:
      found: the text around search results, with {text} and optionally {question} after it: a small
        model reads best if the question follows the passages.
    """

    search: tuple[str, str] = ("<search>", "</search>")
    answer: tuple[str, str] = ("<answer>", "</answer>")
    found: str = "\n<result>\n{text}\n</result>\n"


class Part(NamedTuple):
    """A part of a rollout.

    Attributes:
      written: whether the policy wrote it; otherwise it was retrieved.
      tokens: int32 [n].
      log_probs: float32 [n] of the policy at temperature 1; 0 for retrieved tokens.
    """

    written: bool
    tokens: np.ndarray
    log_probs: np.ndarray


class Rollout(NamedTuple):
    """A rollout of a prompt.

    Attributes:
      prompt: int32 [T].
      parts: alternating written and retrieved parts; the first and the last are written.
      queries: the search queries.
      finish: "answer", "stop" (a stop token without an answer), "length" (a turn without a tag) or
        "turns" (more searches than allowed).
      texts: texts of the written parts.
    """

    prompt: np.ndarray
    parts: tuple[Part, ...]
    queries: tuple[str, ...]
    finish: str
    texts: tuple[str, ...]

    def answer(self, tags: Tags) -> str:
        """Returns the text between the answer's tags in the last part; "" if it is not closed."""
        if self.finish != "answer":
            return ""
        return inside(self.texts[-1], tags.answer) or ""

    def said(self, tags: Tags) -> str:
        """Returns the answer; without a closing tag, the text after the opening tag or the whole last
        part."""
        if self.finish == "answer":
            return self.answer(tags)
        text = self.texts[-1]
        return text.rpartition(tags.answer[0])[2].replace(tags.search[1], "").strip()

    def well_formed(self, tags: Tags) -> bool:
        """Returns whether every part but the last has one query, and the last has one answer and no
        query."""
        *asking, last = self.texts
        searches = [text.count(tag) for text in asking for tag in tags.search]
        answers = [text.count(tag) for text in asking for tag in tags.answer]
        return (
            self.finish == "answer"
            and all(count == 1 for count in searches)
            and not any(answers)
            and all(last.count(tag) == 1 for tag in tags.answer)
            and not any(last.count(tag) for tag in tags.search)
            and all(inside(text, tags.search) for text in asking)
        )


class Budget(NamedTuple):
    """The limits of a rollout.

    Attributes:
      turns: maximum number of searches.
      written: maximum tokens between two searches, or up to the end of the answer.
      found: maximum tokens of a search result, with its tags; longer texts are truncated.
    """

    turns: int = 4
    written: int = 64
    found: int = 128


TAGS, BUDGET = Tags(), Budget()


class Growing:
    """A rollout that is being written."""

    def __init__(self, prompt, tokenizer, tags: Tags, budget: Budget, stop_tokens):
        self.prompt, self._tokenizer, self._tags = prompt, tokenizer, tags
        self._budget, self._stop_tokens = budget, stop_tokens
        self.parts: list[Part] = []
        self.queries: list[str] = []
        self.texts: list[str] = []
        self.finish, self.query, self.unread = "", "", 0
        self.writing, self.waits = True, False
        self._begin()

    def _begin(self) -> None:
        self._tokens: list[int] = []
        self._log_probs: list[float] = []

    def add(self, tokens, log_probs) -> int:
        """Takes tokens up to the end of the part; returns how many it took."""
        if not self._ends_within(tokens):  # most pieces: one look at the text, not one a token
            self._tokens += map(int, tokens)
            self._log_probs += map(float, log_probs)
            return len(tokens)
        for count, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True), 1):
            self._tokens.append(int(token))
            self._log_probs.append(float(log_prob))
            if self._ended():
                self.unread = int(count == len(tokens))
                return count
        return len(tokens)

    def _ends_within(self, tokens) -> bool:
        if len(self._tokens) + len(tokens) >= self._budget.written:
            return True
        text = self._text([*self._tokens, *map(int, tokens)])
        closing = self._tags.search[1], self._tags.answer[1]
        return any(t in self._stop_tokens for t in tokens) or any(tag in text for tag in closing)

    def _ended(self) -> bool:
        if self._tokens[-1] in self._stop_tokens:
            return self._close("stop")
        text = self._text(self._tokens)
        if self._tags.answer[1] in text:
            return self._close("answer")
        if self._tags.search[1] in text:
            if len(self.queries) == self._budget.turns:
                return self._close("turns")
            self.query = (inside(text, self._tags.search) or "").strip()
            self._keep(text)
            self.queries.append(self.query)
            self.writing, self.waits = False, True
            return True
        if len(self._tokens) >= self._budget.written:
            return self._close("length")
        return False

    def _text(self, tokens: list[int]) -> str:
        tokens = [t for t in tokens if t not in self._stop_tokens]
        return self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _keep(self, text: str) -> None:
        self.texts.append(text)
        arrays = np.array(self._tokens, np.int32), np.array(self._log_probs, np.float32)
        self.parts.append(Part(True, *arrays))
        self._begin()

    def _close(self, finish: str) -> bool:
        self._keep(self._text(self._tokens))
        self.finish, self.writing = finish, False
        return True

    def found(self, tokens: list[int], unread: int) -> list[int]:
        """Takes what was found; returns what is to be read: with the last token, if it is unread."""
        last = self.parts[-1].tokens[len(self.parts[-1].tokens) - unread :].tolist()
        self.parts.append(
            Part(False, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32))
        )
        self.waits, self.writing = False, True
        return [*last, *tokens]

    def done(self) -> Rollout:
        told = tuple(self.parts), tuple(self.queries), self.finish, tuple(self.texts)
        return Rollout(np.asarray(self.prompt, np.int32), *told)


class Searching(NamedTuple):
    """The settings of searching while writing.

    Attributes:
      instruction: the beginning of a rollout, with {question} and optionally the tags {open}, {close},
        {answer}, {end}.
      asked: the query sent to the search for a {query} in the text.
      passages: number of passages per search.
      bos: whether the tokenizer's BOS comes first, if it has one; a chat template has its own.
    """

    instruction: str = (
        "Answer the question. Think first. To look something up, write {open}query{close}; what is "
        "found follows. When you know enough, write {answer}the answer in as few words as possible"
        "{end}.\nQuestion: {question}\n"
    )
    asked: str = "{query}"
    passages: int = 1
    tags: Tags = TAGS
    budget: Budget = BUDGET
    bos: bool = True

    def opening(self, question: str) -> str:
        """The text of a prompt."""
        (opening, closing), (answer, end) = self.tags.search, self.tags.answer
        marks = {"open": opening, "close": closing, "answer": answer, "end": end}
        text = self.instruction
        for name, mark in (marks | {"question": question}).items():
            text = text.replace(f"{{{name}}}", mark)
        return text

    def prompt(self, tokenizer, question: str) -> np.ndarray:
        """Its tokens int32 [T]; special tokens in the question are only text.

        Raises:
          DataError: a question that contains half a character.
        """
        require_whole(question, f"the question {question[:80]!r}")
        text = self.opening(plain(tokenizer, question))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = [tokenizer.bos_token_id] if self.bos and tokenizer.bos_token_id is not None else []
        return np.array([*first, *tokens], np.int32)

    def in_chat(self, tokenizer) -> "Searching":
        """The instruction as what a user says, in the tokenizer's chat template."""
        return self._replace(instruction=turns(tokenizer, self.instruction, reply=True), bos=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, to be written down."""
        nested = {"tags": self.tags._asdict(), "budget": self.budget._asdict()}
        return self._asdict() | nested

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Searching":
        """Returns the settings that `as_dict` wrote."""
        tags = {n: x if n == "found" else tuple(x) for n, x in settings["tags"].items()}
        nested = {"tags": Tags(**tags), "budget": Budget(**settings["budget"])}
        return cls(**{**settings, **nested})


SEARCHING = Searching()
# For the built-in models: they read a question best after the passages, know an answer by what ends it,
# and take a bare name for the beginning of a text.
COMPACT_SEARCHING = Searching(
    instruction="{question}\n",
    asked="About the {query}",
    tags=Tags(("Search:", "\n"), ("Answer:", "</s>"), "{text}\n{question}\n"),
    budget=Budget(turns=2, written=16, found=64),
)


def searching_of(style: PromptStyle, tokenizer) -> Searching:
    """Returns the search settings that suit a prompt style."""
    if style.question == COMPACT.question:
        return COMPACT_SEARCHING
    if style.bos:
        return SEARCHING
    try:
        return SEARCHING.in_chat(tokenizer)
    except ConfigError:  # no chat template, or one that fails: the style has a beginning of its own
        return SEARCHING._replace(bos=False)


def inside(text: str, tags: tuple[str, str]) -> str | None:
    """Returns the text between the first closing tag and the last opening tag before it; None if
    none."""
    head, closed, _ = text.partition(tags[1])
    found = re.split(re.escape(tags[0]), head)
    return found[-1].strip() if closed and len(found) > 1 else None
