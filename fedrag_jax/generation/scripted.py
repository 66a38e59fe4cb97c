"""Scripted rollouts in the right format, which a policy imitates in its warm-up.

A script searches for a name in the question, then for names in the results, and gives the answer that
the untrained model reads there. The queries after the first, and their number, are random: a script
knows neither answers nor the way to them.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.prompts import plain
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.rollouts import Part, Rollout, Searching
from fedrag_jax.generation.searching import Search, Spelled

_CAPITALISED = re.compile(r"[^\W\d_a-z]\w*(?:[ -][^\W\d_a-z]\w*)*")
_ARTICLE = re.compile(r"^(?:The|A|An) (?=\w)")


def scripted(
    questions: Sequence[str],
    tokenizer,
    searching: Searching,
    search: Search,
    read: Callable[[list[list[str]]], list[str]],
    rng: np.random.Generator,
) -> list[Rollout]:
    """One script for each question.

    Args:
      search: as in `searching.rolling_out`, with the indices of questions; called once per turn.
      read: function that returns the model's answer to each question from the results of its queries.

    Raises:
      ConfigError: a budget with no room for text between tags.
    """
    scripts = [_Script(question, tokenizer, searching) for question in questions]
    turns = searching.budget.turns
    counts = rng.integers(min(1, turns), turns, len(scripts), endpoint=True)
    for turn in range(turns):
        asking = [number for number, count in enumerate(counts) if turn < count]
        queries = [scripts[number].ask(rng) for number in asking]
        for number, text in zip(asking, search(queries, asking) if asking else (), strict=True):
            scripts[number].read(text)
    answers = read([script.queries for script in scripts])
    return [script.answered(answer) for script, answer in zip(scripts, answers, strict=True)]


def names(text: str) -> list[str]:
    """Returns sequences of capitalised words, without articles; a single word at the start of a
    sentence counts only if there are no others."""
    found = [(_ARTICLE.sub("", m[0]), _opens(text, m.start())) for m in _CAPITALISED.finditer(text)]
    sure = [name for name, opens in found if " " in name or not opens]
    return sure or [name for name, _ in found]


def _opens(text: str, start: int) -> bool:
    before = text[:start].rstrip()
    return not before or before[-1] in ".!?:\n"


class _Script:
    def __init__(self, question: str, tokenizer, searching: Searching):
        self.question, self.searching, self._budget = question, searching, searching.budget
        self._tokenizer, self._spelling = tokenizer, Spelling(tokenizer)
        self._spelled = Spelled(tokenizer, searching.tags, searching.budget.found)
        self._last = question  # what names are from
        self.parts: list[Part] = []
        self.queries: list[str] = []
        self.texts: list[str] = []

    def ask(self, rng: np.random.Generator) -> str:
        found = names(self._last)
        other = [name for name in found if name not in self.queries]
        query = str(rng.choice(other or found or [self.question]))
        self.queries.append(self._write(self.searching.tags.search, query, self._budget.written))
        return self.queries[-1]

    def read(self, text: str) -> None:
        self._last = text
        self._put(False, self._spelled(text, self.question))

    def answered(self, answer: str) -> Rollout:
        # An answer as long as the system's may take more than a turn; a table has room for all turns.
        used = sum(len(part.tokens) for part in self.parts if part.written)
        room = (self._budget.turns + 1) * self._budget.written - used
        self._write(self.searching.tags.answer, answer, room)
        prompt = self.searching.prompt(self._tokenizer, self.question)
        return Rollout(prompt, tuple(self.parts), tuple(self.queries), "answer", tuple(self.texts))

    def _write(self, tags: tuple[str, str], text: str, most: int) -> str:
        """Writes as much of a text as fits into `most` tokens with its tags; returns what it wrote."""
        room, whole = most, self._tagged(tags, text)
        while len(tokens := self._spelling.after("\n", whole)) > most:
            room -= 1
            if room < 1:
                raise ConfigError(
                    f"a turn of {self._budget.written} tokens has no room for a text between "
                    f"{tags[0]!r} and {tags[1]!r}: raise the budget's `written`"
                )
            text = self._spelling.cut(text, room)[0].rstrip()
            whole = self._tagged(tags, text)
        self.texts.append(whole)
        self._put(True, tokens)
        return text

    def _tagged(self, tags: tuple[str, str], text: str) -> str:
        return f"{tags[0]} {plain(self._tokenizer, text)}{tags[1]}"

    def _put(self, written: bool, tokens: Sequence[int]) -> None:
        none = np.zeros(len(tokens), np.float32)
        self.parts.append(Part(written, np.array(tokens, np.int32), none))
