"""Prompt styles: the text around question, passages and answer.

A prompt is a sequence of segments (opening, passages, question, answer). Each segment is tokenised
separately if the tokenizer allows it (`spelling`). The boundary of the answer is then exact, and a
passage is tokenised once, however often it is retrieved.
"""

import functools
import re
from typing import NamedTuple

from fedrag_jax.errors import ConfigError


class PromptStyle(NamedTuple):
    """The text around the parts of a prompt.

    Attributes:
      passage: the text around a passage, `{text}`, optionally with its `{number}` (from 1) before it.
      end: the token after an answer; the tokenizer's EOS if empty.
      bos: whether the tokenizer's BOS comes first.
      final: the text between reasoning and the final answer; empty if there is no reasoning.
      instructed: the opening with a system prompt, `{system}`; if empty, the system prompt is a line
        before the opening.
      one_line: whether an answer ends at a line break, as in tables of exact match; if `final` spans
        several lines, an answer may too.
      stop: string that ends an answer of several lines, if not empty: small models continue with
        another question under the heading of the prompt.
    """

    opening: str
    passage: str
    question: str
    answer: str
    end: str = ""
    bos: bool = True
    final: str = ""
    instructed: str = ""
    one_line: bool = True
    stop: str = ""

    def under(self, system: str) -> "PromptStyle":
        """Returns the style with this system prompt, which replaces an existing one."""
        template = self.instructed or "{system}\n" + self.opening
        return self._replace(opening=template.replace("{system}", system), instructed=template)


# For the built-in decoder, which has no use for instructions and pays for every token.
COMPACT = PromptStyle(
    opening="",
    passage="{text}\n",
    question="{question}",
    answer=" {answer}",
)

# The order and headings of Lawton et al. 2025, appendix A: role, instruction, context, question.
INSTRUCT = PromptStyle(
    opening=(
        "You are a helpful general knowledge expert. Answer the question using the relevant "
        "context, in as few words as possible.\n### Context:\n"
    ),
    passage="{text}\n",
    question="### Question:\n{question}\n### Answer:\n",
    answer="{answer}",
    one_line=False,
    stop="\n### Question",
)

# Reasoning before the answer. "Answer" without a space is one token of the built-in decoder.
COMPACT_REASONED = COMPACT._replace(final="Answer: ")

# Citing: the numbers of the passages that were read stand where reasoning does, before the answer.
COMPACT_CITED = PromptStyle(
    opening="",
    passage="{number}: {text}\n",
    question="Question: {question}\nCite:",
    answer=" {answer}",
    final="\nAnswer: ",
)

# The marks of the code of RAFT (arXiv 2403.10131).
RAFT = INSTRUCT._replace(
    opening=(
        "You are a helpful general knowledge expert. Answer the question using the relevant "
        "context. First reason on one line, copying each sentence that you rely on between "
        "##begin_quote## and ##end_quote##; then write <ANSWER>: and the answer in as few words as "
        "possible.\n### Context:\n"
    ),
    final=" <ANSWER>: ",
    one_line=True,
)

# The headings of ALoFTRAG (arXiv 2501.11929, appendix B): the numbers of the passages, then the answer.
CITED = PromptStyle(
    opening=(
        "You answer questions from numbered documents. First give the numbers of the documents that "
        "answer the question best, separated by commas; then answer it, in {language}. Write:\n\n"
        "### Reference\n<numbers>\n\n### Answer\n<answer>\n\n"
    ),
    passage="### {number}\n{text}\n\n",
    question="### Question\n{question}\n\n### Reference\n",
    answer="{answer}",
    final="\n\n### Answer\n",
    one_line=False,
    stop="\n### Question",
)

STYLES = {
    "compact": COMPACT,
    "compact_reasoned": COMPACT_REASONED,
    "compact_cited": COMPACT_CITED,
    "instruct": INSTRUCT,
    "cited": CITED,
    "raft": RAFT,
}
# In the turns of a chat: the style, what the user asks after the passages, how the assistant begins.
CHATS = {
    "chat": (INSTRUCT, "### Question:\n{question}", ""),
    "chat_cited": (CITED, "### Question\n{question}", "### Reference\n"),
}


def named_style(name: str, tokenizer, language: str = "English") -> PromptStyle:
    """Returns one of `STYLES`, or one of `CHATS`, which use the tokenizer's own chat template.

    Args:
      language: language of answers, if the style names one.

    Raises:
      ConfigError: an unknown name, or no chat template that keeps the user's words.
    """
    if name not in (*STYLES, *CHATS):
        raise ConfigError(f"prompt_style must be one of {[*STYLES, *CHATS]}, got {name!r}")
    style = _chat(tokenizer, name) if name in CHATS else STYLES[name]
    return style._replace(opening=style.opening.replace("{language}", language))


def plain(tokenizer, text: str) -> str:
    """Returns a text without special tokens: in "</s>" or "<|im_start|>", the first letter is
    separated, so that a passage cannot end its turn and speak for another role."""
    specials = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    return _any_of(specials).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@functools.lru_cache(16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern:
    """Returns a pattern of all tokens, the longest first; it matches nothing if there are none."""
    longest_first = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


# Templates that tell the date tell this one, so that a system asks the same tomorrow.
_SAME_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"


def turns(tokenizer, *contents: str, reply: bool = False, system: str = "") -> str:
    """Formats alternating user and assistant turns with the tokenizer's chat template.

    Args:
      reply: whether to add the opening of the assistant's next turn.
      system: system turn before the others; none if empty.

    Raises:
      ConfigError: no chat template, several without one named "default", or a template that fails.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise ConfigError("prompt style of a chat: the tokenizer has no chat template")
    if isinstance(templates, dict) and "default" not in templates:
        raise ConfigError(
            f"prompt style of a chat: of the tokenizer's chat templates {sorted(templates)} none is "
            "named 'default'; save the right one as chat_template.jinja"
        )
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=reply,
            chat_template=_SAME_DAY + tokenizer.get_chat_template(),
            # Reasoning aloud, where a template offers it, would have to be written before each answer.
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise ConfigError(
            f"prompt style of a chat: the template fails ({type(error).__name__}: {error})"
        ) from error


def _chat(tokenizer, name: str) -> PromptStyle:
    """The user gives instruction, context and question; the assistant answers."""
    style, asking, start = CHATS[name]
    passages, question, answer = "@passages@", "{question}", "@answer@"
    said = f"{style.opening}{passages}{asking}"
    try:
        asked, answered = turns(tokenizer, said, reply=True), turns(tokenizer, said, answer)
        passed = passages in asked and question in asked and answer in answered
        why = "" if passed else "the template does not keep the words of user and assistant"
    except ConfigError as error:
        why = str(error)
    if why:
        other = next(n for n, known in STYLES.items() if known is style)
        raise ConfigError(f"prompt_style {name!r}: {why}; use {other!r}")
    opening, _, rest = asked.partition(passages)
    before, _, after = rest.partition(question)
    until, _, end = answered.partition(answer)
    lead = until.removeprefix(asked) if until.startswith(asked) else ""
    after, lead = (text.replace("{", "{{").replace("}", "}}") for text in (after, lead))
    instructed = _under_system(tokenizer, said).partition(passages)[0]
    asks, writes = before + question + after, lead + "{answer}"
    if start:  # is given, with all that comes before it
        asks, writes = asks + lead + start, "{answer}"
    return PromptStyle(
        opening,
        style.passage,
        asks,
        writes,
        end,
        bos=False,
        final=style.final,
        instructed=instructed,
        one_line=style.one_line,
        stop=style.stop,
    )


def _under_system(tokenizer, said: str) -> str:
    """Formats a user turn with a `{system}` prompt, which opens the user turn if there is no system
    turn."""
    mark = "@system@"
    try:
        asked = turns(tokenizer, said, reply=True, system=mark)
    except ConfigError:
        asked = ""
    if mark not in asked:
        asked = turns(tokenizer, f"{mark}\n\n{said}", reply=True)
    return asked.replace(mark, "{system}")


# What the built-in decoder was also taught: to rate a text from 0 to 10 by how much can be asked
# about it, and to ask a question with its answer.
RATE = PromptStyle("", "Text: {text}\n", "Rate:", " {answer}")
ASK = PromptStyle("", "Text: {text}\n", "Ask:", " {question}\nAnswer: {answer}")
