"""The texts of passages for the document encoder, read on demand."""

from collections.abc import Iterator, Sequence
from typing import overload

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.data.passage_table import PassageTable
from fedrag_jax.models.pooling import Use


class PassageTexts(Sequence[str]):
    """The texts [N] of passages with the encoder's prompt, as a lazy sequence.

    Args:
      use: the encoder's settings, which contain the prompt.
    """

    def __init__(self, passages: Sequence[Passage], use: Use):
        self.passages, self.use = passages, use

    @property
    def fingerprint(self) -> str:
        """Equal for equal texts from one table; "" for passages in memory."""
        if not isinstance(self.passages, PassageTable):
            return ""
        return f"{self.passages.fingerprint} {self.use.passage_text('')!r}"

    def __len__(self) -> int:
        return len(self.passages)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self._text(passage) for passage in self.passages[row]]
        return self._text(self.passages[row])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self.passages)

    def _text(self, passage: Passage) -> str:
        return self.use.passage_text(embedding_text(passage))
