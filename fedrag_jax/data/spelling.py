"""How a tokenizer spells a text that follows another.

Byte-level tokenizers spell most texts the same wherever they stand, so parts of a prompt are tokenised
once and put together. Those of the kind of SentencePiece put a space before every text they are given,
and may join what lies on both sides of a seam: their prompts are tokenised whole.
"""

import json
from collections.abc import Sequence

# Seams of prompts: after a line, before a question, before an answer.
_PARTS = ["One text.\n", "Two texts.\n", "Who?", " Me."]


class Spelling:
    """Tokens of texts, none of which opens or closes a sequence.

    Attributes:
      adds_up: whether the tokens of parts are those of the whole.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        parts = [token for tokens in self(_PARTS) for token in tokens]
        self.adds_up = parts == self.whole("".join(_PARTS))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, as if it stood alone."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def whole(self, text: str) -> list[int]:
        """Of one text."""
        return self([text])[0]

    def after(self, before: str, text: str) -> list[int]:
        """Of a text as it follows another, such as an answer after its question.

        Where a token would lie on both sides of the seam, but what comes before is there already, the
        text is spelled as on a line of its own.
        """
        if self.adds_up or not before:
            return self.whole(text)
        head, both = self.whole(before), self.whole(before + text)
        if both[: len(head)] != head:
            head, both = self.whole("\n"), self.whole("\n" + text)
        return both[len(head) :]

    def cut(self, text: str, most: int) -> tuple[str, int]:
        """The beginning of a text that stands alone, of `most` tokens, and how many it has."""
        tokens = self.whole(text)
        if len(tokens) <= most:
            return text, len(tokens)
        if not self._tokenizer.is_fast:  # those in Python alone do not tell where a token ends
            return self._tokenizer.decode(tokens[:most]), most
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return text[: found["offset_mapping"][most - 1][1] if most > 0 else 0], most


def definition(tokenizer) -> str:
    """What a Hugging Face tokenizer does, as JSON: equal for equal tokenizers.

    Left out is what its last call cut and padded to: a state of the object, not of the tokenizer.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told = {k: v for k, v in told.items() if k not in ("truncation", "padding")}
    return json.dumps(told, sort_keys=True)
