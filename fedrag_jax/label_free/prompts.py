"""Prompts of label-free fine-tuning, and parsing of replies (ALoFTRAG, 2501.11929, appendix B).

`COMPACT` has the prompts that the built-in decoder was trained on. `instruct(language)` has paraphrased
instructions with the headings of the paper; `short(language)` and `examples()` are for generators too
small to keep to them. To change prompts, `_replace` some of them, or write a JSON file that `read`
reads.
"""

import json
import pathlib
import re
from typing import NamedTuple

from fedrag_jax.data.prompts import ASK, RATE
from fedrag_jax.errors import ConfigError

# What else than {text} is filled into each prompt.
FILLED = {"answer": ("question",), "rate_question": ("question",),
          "rate_answer": ("question", "answer")}  # fmt: skip
_READ = {"score", "question", "answer", "verdict"}  # groups without which there is nothing to use
_PART = "(?:(?!###).)"  # no heading: a second question is no answer
RATING = r"\[?(?P<score>\d+(\.\d+)?)\]?"


class Ask(NamedTuple):
    """One prompt of a generator.

    Attributes:
      system: the instructions.
      user: the user text, with `{text}` and, if needed, `{question}` and `{answer}`.
      start: the given beginning of the reply.
      reply: regular expression of the rest of the reply, with groups named `score`, or `question` and
        `answer`; others are recorded where they match.
      max_tokens: maximum tokens of a reply.
      stop: string that ends a reply, if not empty.
      chat: whether to use the model's chat template; otherwise the model continues the plain text.
    """

    system: str
    user: str
    start: str
    reply: str
    max_tokens: int
    stop: str = ""
    chat: bool = True

    def read(self, written: str) -> dict[str, str] | None:
        """Parses a reply; returns None if it does not have the requested format, or has the names of
        its parts ("<question>") instead of them.

        A reply may repeat `start`, because the beginning of a chat reply cannot always be given.
        """
        said = written.strip().removeprefix(self.start.strip()).strip()
        found = re.fullmatch(self.reply, said, re.DOTALL)
        if found is None:
            return None
        groups = found.groupdict().items()
        said = {n: (x or "").strip() for n, x in groups if x is not None or n in _READ}
        named = any(value.startswith(f"<{name}>") for name, value in said.items())
        return said if all(said.values()) and not named else None


class LabelFreePrompts(NamedTuple):
    """The prompts of the steps before training.

    Attributes:
      rate_text: how much useful information a text has, from 0 to 10.
      ask: a question about a text, with its answer.
      rate_question: whether a text answers a question, from 0 to 10.
      rate_answer: whether an answer is right, from 0 to 10.
      answer: the answer to a question, if `ask` asks for the question alone.
    """

    rate_text: Ask
    ask: Ask
    rate_question: Ask
    rate_answer: Ask
    answer: Ask | None = None


def _compact(style, asked: str = "", reply: str = RATING, max_tokens: int = 4) -> Ask:
    return Ask("", style.passage + asked, style.question, reply, max_tokens)


COMPACT = LabelFreePrompts(
    rate_text=_compact(RATE),
    ask=_compact(ASK, reply=r"(?P<question>[^\n]+)\nAnswer: (?P<answer>[^\n]+)", max_tokens=48),
    rate_question=_compact(RATE, "Question: {question}\n"),
    rate_answer=_compact(RATE, "Question: {question}\nAnswer: {answer}\n"),
)


def instruct(language: str = "English") -> LabelFreePrompts:
    """Returns prompts for generators that follow instructions, in the language of the texts."""
    scale = "Give a score from 0 to 10, where"
    told = "Write nothing but this:\n\n"
    return LabelFreePrompts(
        rate_text=Ask(
            "You judge how much useful information there is in a text. "
            + scale
            + " 0 is none at all "
            f"and 10 is a great deal. {told}### Filter score\n<score>",
            "{text}",
            "### Filter score\n",
            RATING,
            20,
        ),
        ask=Ask(
            "You write a question about a text, and its answer. The text alone must be enough to "
            "answer it, and the question must make sense to somebody who has never seen the text: it "
            "does not mention the text and takes nothing of it as known. Keep the answer short where "
            f"a short one will do. Write both in fluent, natural {language}. {told}"
            "### Question\n<question>\n\n### Answer\n<answer>",
            "{text}",
            "### Question\n",
            rf"(?P<question>{_PART}+?)\s*### Answer\n(?P<answer>{_PART}+)",
            512,
        ),
        rate_question=Ask(
            f"You judge a question about a text. {scale} 0 is a question that the text does not "
            f"answer or that is not written in fluent, natural {language}, and 10 one that the text "
            f"answers in full and that is so written. {told}### Question rating score\n<score>",
            "### Context\n{text}\n\n### Question\n{question}",
            "### Question rating score\n",
            RATING,
            16,
        ),
        rate_answer=Ask(
            f"You judge an answer to a question about a text. {scale} 0 is an answer that is wrong by "
            f"the text or not written in fluent, natural {language}, and 10 one that is right by the "
            f"text and so written. {told}### Answer rating score\n<score>",
            "### Context\n{text}\n\n### Question\n{question}\n\n### Answer\n{answer}",
            "### Answer rating score\n",
            RATING,
            16,
        ),
    )


def short(language: str = "English") -> LabelFreePrompts:
    """Returns short instructions whose replies are one line after a given heading, for generators that
    copy the format of `instruct` instead of filling it; question and answer are two requests."""
    scale = "Reply with a number from 0"
    text, asked = "{text}\n\n", "Question: {question}\n"

    def line(system: str, user: str, start: str, reply: str = RATING, tokens: int = 6) -> Ask:
        return Ask(system, user.strip(), start, reply, tokens, "\n")

    return LabelFreePrompts(
        rate_text=line(f"How much does this text tell? {scale} (nothing) to 10.", text, "Score:"),
        ask=line(
            f"Write one short question in {language} about a fact in this text.",
            text, "Question:", r"(?P<question>[^\n]+)", 48,
        ),
        answer=line(
            f"Answer the question from this text in a few words of {language}.",
            text + asked, "Answer:", r"(?P<answer>[^\n]+)", 48,
        ),
        rate_question=line(
            f"Does the text answer the question? {scale} (no) to 10 (yes).", text + asked, "Score:"
        ),
        rate_answer=line(
            f"Is the answer right by the text? {scale} (no) to 10 (yes).",
            text + asked + "Answer: {answer}", "Score:",
        ),
    )  # fmt: skip


# Texts with their points, and of the useful ones a question with its answer.
_SHOWN = (
    (
        "The Rhine rises in the Swiss Alps and flows through six countries before it reaches the "
        "North Sea. With a length of about 1,230 kilometres it is the second-longest river of Central "
        "Europe.",
        9, "Into which sea does the Rhine flow?", "the North Sea",
    ),
    ("Home. About us. Contact. Click here to log in, or here to choose a new password.", 0, "", ""),
    (
        "Marie Curie was born in Warsaw in 1867. She won the Nobel Prize in Physics in 1903 with her "
        "husband Pierre and Henri Becquerel, and the Nobel Prize in Chemistry in 1911 for the "
        "discovery of polonium and radium.",
        10, "In which year did Marie Curie win the Nobel Prize in Chemistry?", "1911",
    ),
    (
        "Photosynthesis turns light into chemical energy. In plants it takes place in the "
        "chloroplasts, which hold a green pigment called chlorophyll.",
        8, "Which pigment do the chloroplasts of plants hold?", "chlorophyll",
    ),
)  # fmt: skip


def examples() -> LabelFreePrompts:
    """Returns prompts for generators too small to follow instructions, for English texts: they continue
    a page of example texts with ratings, or with questions and answers, followed by the text."""
    useful = [shown for shown in _SHOWN if shown[2]]
    rated = "".join(f"Text: {text}\nUseful: {points}\n\n" for text, points, *_ in _SHOWN)
    asked = "".join(f"Text: {text}\nQuestion: {q}\nAnswer: {a}\n\n" for text, _, q, a in useful)
    others = [question for *_, question, _ in useful[1:] + useful[:1]]
    fits = "".join(
        f"Text: {text}\nQuestion: {question}\nAnswered by the text: {points}\n\n"
        for (text, _, right, _), other in zip(useful, others, strict=True)
        for question, points in ((right, 10), (other, 0))
    )
    right = "".join(
        f"Text: {text}\nQuestion: {question}\nAnswer: {said}\nRight: {points}\n\n"
        for text, _, question, answer in useful
        for said, points in ((answer, 10), ("nobody knows", 0))
    )

    def continued(page: str, user: str, start: str, reply: str = RATING, tokens: int = 6) -> Ask:
        return Ask("", f"{page}Text: {{text}}\n{user}", start, reply, tokens, "\n", chat=False)

    asking = "Question: {question}\n"
    return LabelFreePrompts(
        rate_text=continued(rated, "", "Useful:"),
        ask=continued(asked, "", "Question:", r"(?P<question>[^\n]+)", 48),
        answer=continued(asked, asking, "Answer:", r"(?P<answer>[^\n]+)", 48),
        rate_question=continued(fits, asking, "Answered by the text:"),
        rate_answer=continued(right, asking + "Answer: {answer}\n", "Right:"),
    )


# Whether an answer is right, by somebody who is not tuned (the paper's prompt 6).
JUDGE = Ask(
    "You judge an answer to a question about a text. You are given the text, the question, a "
    "reference answer that is right, and the answer to be judged. Write nothing but TRUE if that "
    "answer is right, and nothing but FALSE if it is not.",
    "### Text\n{text}\n\n### Question\n{question}\n\n### Reference answer\n{reference}\n\n"
    "### Answer\n{answer}",
    "",
    r"(?P<verdict>TRUE|FALSE)\.?",
    8,
)


def by_name(name: str, language: str = "English") -> LabelFreePrompts:
    """Returns the prompts "compact", "instruct", "short" or "examples", or those of a JSON file.

    Raises:
      ConfigError: another name that is no file; as `read`.
    """
    known = {
        "compact": lambda: COMPACT,
        "instruct": lambda: instruct(language),
        "short": lambda: short(language),
        "examples": examples,
    }
    if name in known:
        return known[name]()
    if not pathlib.Path(name).is_file():
        raise ConfigError(
            f"unknown prompts {name!r}; choose among {[*known]}, or give a JSON file of prompts"
        )
    return read(name, language)


def read(path: str | pathlib.Path, language: str = "English") -> LabelFreePrompts:
    """Prompts from a JSON file: an object with the fields of `LabelFreePrompts`, and of `Ask` in each.

    Args:
      language: replaces `{language}` in every `system`.

    Raises:
      ConfigError: a missing file, invalid JSON, a missing or unknown field, one of another type, a
        `user` that lacks a placeholder, or a `reply` that is not a regular expression or lacks its
        groups.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"not a JSON object: {str(found)[:60]}")
        asks = {
            name: _typed(name, Ask(**found.pop(name)))
            for name in LabelFreePrompts._fields
            if name != "answer" or found.get(name)
        }
        prompts = LabelFreePrompts(
            **{
                name: ask._replace(system=ask.system.replace("{language}", language))
                for name, ask in asks.items()
            },
            **found,
        )
        groups = {"ask": {"question"}, "answer": {"answer"}}
        if "answer" not in asks:
            groups["ask"] = {"question", "answer"}
        for name, ask in asks.items():
            wanted = groups.get(name, {"score"})
            missing = wanted - re.compile(ask.reply).groupindex.keys()
            if missing:
                raise ConfigError(
                    f"{path}: {name}: reply has no group named {sorted(missing)[0]!r}"
                )
            for part in ("text", *FILLED.get(name, ())):
                if f"{{{part}}}" not in ask.user:
                    raise ConfigError(f"{path}: {name}: user has no {{{part}}}, which is filled in")
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError, re.error) as error:
        raise ConfigError(f"{path}: no prompts for label-free fine-tuning ({error!r})") from error
    return prompts


def _typed(name: str, ask: Ask) -> Ask:
    for field, kind in Ask.__annotations__.items():
        if type(value := getattr(ask, field)) is not kind:
            raise TypeError(f"{name}: {field} must be of type {kind.__name__}, got {value!r}")
    return ask


def write(prompts: LabelFreePrompts, path: str | pathlib.Path) -> None:
    """Writes a file that `read` reads, as a starting point."""
    fields = {name: ask._asdict() for name, ask in prompts._asdict().items() if ask}
    pathlib.Path(path).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
