"""How a question and its passages are put to a generator, and what it should write.

A prompt is a row of segments (opening, passages, question, answer), each tokenised on its own: the
boundary of the answer is exact, and a passage is tokenised once however often it is retrieved.
"""

from typing import NamedTuple


class PromptStyle(NamedTuple):
    """The text around the parts of a prompt; the answer ends with the tokenizer's EOS."""

    opening: str
    passage: str
    question: str
    answer: str


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

STYLES = {"compact": COMPACT, "instruct": INSTRUCT}

# What the built-in decoder was also taught: to rate a text from 0 to 10 by how much can be asked
# about it, to ask a question with its answer, and to cite the passage before it answers.
RATE = PromptStyle("", "Text: {text}\n", "Rate:", " {answer}")
ASK = PromptStyle("", "Text: {text}\n", "Ask:", " {question}\nAnswer: {answer}")
CITE = PromptStyle(
    "", "{number}: {text}\n", "Question: {question}\nCite:", " {number}\nAnswer: {answer}"
)
