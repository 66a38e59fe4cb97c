"""Tokenisation of a text that follows another text.

Byte-level tokenizers tokenise most texts the same way in every position, so the parts of a prompt are
tokenised once and concatenated. SentencePiece-like tokenizers put a space before every text, and may
merge characters across a boundary: their prompts are tokenised as a whole.
"""

import json
from collections.abc import Sequence

# Seams of prompts: after a line, before a question, before an answer.
_PARTS = ["One text.\n", "Two texts.\n", "Who?", " Me."]


class Spelling:
    """Tokenises texts without special tokens.

    Attributes:
      adds_up: whether the tokens of concatenated parts equal the tokens of the whole text.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        parts = [token for tokens in self(_PARTS) for token in tokens]
        self.adds_up = parts == self.whole("".join(_PARTS))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, tokenised alone."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def whole(self, text: str) -> list[int]:
        """Returns the tokens of one text."""
        return self([text])[0]

    def after(self, before: str, text: str) -> list[int]:
        """Returns the tokens of a text that follows another, such as an answer after its question.

        If a token would cross the boundary, the text is tokenised as if it were on a new line, because
        the tokens before it are already fixed.
        """
        if self.adds_up or not before:
            return self.whole(text)
        head, both = self.whole(before), self.whole(before + text)
        if both[: len(head)] != head:
            head, both = self.whole("\n"), self.whole("\n" + text)
        return both[len(head) :]

    def cut(self, text: str, most: int) -> tuple[str, int]:
        """Returns the beginning of a text, at most `most` tokens, and its number of tokens."""
        tokens = self.whole(text)
        if len(tokens) <= most:
            return text, len(tokens)
        if not self._tokenizer.is_fast:  # those in Python alone do not tell where a token ends
            return self._tokenizer.decode(tokens[:most]), most
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return text[: found["offset_mapping"][most - 1][1] if most > 0 else 0], most


def definition(tokenizer) -> str:
    """Returns the definition of a Hugging Face tokenizer as JSON; equal for equal tokenizers.

    The truncation and padding of its last call are left out: they are a state of the object.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told = {k: v for k, v in told.items() if k not in ("truncation", "padding")}
    return json.dumps(told, sort_keys=True)
