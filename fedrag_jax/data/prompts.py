"""How a question and its passages are put to a generator, and what it should write.

A prompt is a row of segments (opening, passages, question, answer), each tokenised on its own: the
boundary of the answer is exact, and a passage is tokenised once however often it is retrieved.
"""

from typing import NamedTuple

import jinja2

from fedrag_jax.errors import ConfigError


class PromptStyle(NamedTuple):
    """The text around the parts of a prompt.

    Attributes:
      end: the token after an answer; the tokenizer's EOS if empty.
      bos: whether the tokenizer's BOS comes first.
      final: what stands between reasoning and the final answer, on one line; empty where answers come
        without reasoning. What follows it is the answer.
    """

    opening: str
    passage: str
    question: str
    answer: str
    end: str = ""
    bos: bool = True
    final: str = ""


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
)

# Reasoning before the answer. "Answer" without a space is one token of the built-in decoder.
COMPACT_REASONED = COMPACT._replace(final="Answer: ")

# The marks of the code of RAFT (arXiv 2403.10131).
RAFT = INSTRUCT._replace(
    opening=(
        "You are a helpful general knowledge expert. Answer the question using the relevant "
        "context. First reason on one line, copying each sentence that you rely on between "
        "##begin_quote## and ##end_quote##; then write <ANSWER>: and the answer in as few words as "
        "possible.\n### Context:\n"
    ),
    final=" <ANSWER>: ",
)

STYLES = {
    "compact": COMPACT,
    "compact_reasoned": COMPACT_REASONED,
    "instruct": INSTRUCT,
    "raft": RAFT,
}


def named_style(name: str, tokenizer) -> PromptStyle:
    """One of `STYLES`, or "chat": the turns of the tokenizer's own chat template.

    Raises:
      ConfigError: an unknown name, or no chat template that passes the user's words on.
    """
    if name == "chat":
        return _chat(tokenizer)
    if name not in STYLES:
        raise ConfigError(f"prompt_style must be one of {[*STYLES, 'chat']}, got {name!r}")
    return STYLES[name]


# Templates that tell the date tell this one, so that a system asks the same tomorrow.
_SAME_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"


def _chat(tokenizer) -> PromptStyle:
    """The user gives instruction, context and question; the assistant answers."""
    if not tokenizer.chat_template:
        raise ConfigError("prompt_style 'chat': the tokenizer has no chat template; use 'instruct'")

    template = _SAME_DAY + tokenizer.get_chat_template()

    def turns(*contents, **options) -> str:
        roles = zip(("user", "assistant"), contents, strict=False)
        messages = [{"role": role, "content": content} for role, content in roles]
        # Reasoning aloud, where a template offers it, would have to be written before each answer.
        options |= {"chat_template": template, "enable_thinking": False}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"prompt_style 'chat': the chat template fails ({error}); use 'instruct'"
            ) from error

    passages, question, answer = "<passages>", "{question}", "<answer>"
    said = f"{INSTRUCT.opening}{passages}### Question:\n{question}"
    asked, answered = turns(said, add_generation_prompt=True), turns(said, answer)
    if passages not in asked or question not in asked or answer not in answered:
        raise ConfigError(
            "prompt_style 'chat': the chat template does not pass the words of user and assistant on; "
            "use 'instruct'"
        )
    opening, _, rest = asked.partition(passages)
    before, _, after = rest.partition(question)
    until, _, end = answered.partition(answer)
    lead = until.removeprefix(asked) if until.startswith(asked) else ""
    after, lead = (text.replace("{", "{{").replace("}", "}}") for text in (after, lead))
    return PromptStyle(
        opening, INSTRUCT.passage, before + question + after, lead + "{answer}", end, bos=False
    )


# What the built-in decoder was also taught: to rate a text from 0 to 10 by how much can be asked
# about it, to ask a question with its answer, and to cite the passage before it answers.
RATE = PromptStyle("", "Text: {text}\n", "Rate:", " {answer}")
ASK = PromptStyle("", "Text: {text}\n", "Ask:", " {question}\nAnswer: {answer}")
CITE = PromptStyle(
    "", "{number}: {text}\n", "Question: {question}\nCite:", " {number}\nAnswer: {answer}"
)
