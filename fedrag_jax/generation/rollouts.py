"""What becomes of a prompt where a text searches as it is written: parts, queries, answer and form."""

import re
from typing import NamedTuple

import numpy as np


class Tags(NamedTuple):
    """What marks the parts of a rollout; of each but `think` the opening and the closing tag.

    Attributes:
      found: around what a search found, with {text}.
    """

    search: tuple[str, str] = ("<search>", "</search>")
    answer: tuple[str, str] = ("<answer>", "</answer>")
    found: str = "\n<result>\n{text}\n</result>\n"


class Part(NamedTuple):
    """A stretch of a rollout.

    Attributes:
      written: whether the policy wrote it; else it was found.
      tokens: int32 [n].
      log_probs: float32 [n], of the policy at temperature 1; 0 for what was found.
    """

    written: bool
    tokens: np.ndarray
    log_probs: np.ndarray


class Rollout(NamedTuple):
    """What became of a prompt.

    Attributes:
      prompt: int32 [T].
      parts: written and found ones in turns, the first and the last written.
      queries: what was searched for.
      finish: "answer", "stop" (a stop token without an answer), "length" (a turn without a tag) or
        "turns" (another search than allowed).
      texts: of the written parts.
    """

    prompt: np.ndarray
    parts: tuple[Part, ...]
    queries: tuple[str, ...]
    finish: str
    texts: tuple[str, ...]

    def answer(self, tags: Tags) -> str:
        """What stands between the answer's tags in the last part; "" where it is not closed."""
        if self.finish != "answer":
            return ""
        return inside(self.texts[-1], tags.answer) or ""

    def well_formed(self, tags: Tags) -> bool:
        """Whether every part but the last asks once, and the last answers once and asks nothing."""
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
    """What a rollout may take at most.

    Attributes:
      turns: searches.
      written: tokens between two searches, or before the answer ends.
      found: tokens of what a search found, with its tags; longer texts are cut.
    """

    turns: int = 4
    written: int = 64
    found: int = 128


TAGS, BUDGET = Tags(), Budget()


def inside(text: str, tags: tuple[str, str]) -> str | None:
    """What stands between the first closing tag and the last opening one before it; None if none."""
    head, closed, _ = text.partition(tags[1])
    found = re.split(re.escape(tags[0]), head)
    return found[-1].strip() if closed and len(found) > 1 else None
