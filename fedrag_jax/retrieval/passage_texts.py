"""What the document encoder reads of passages, read from them when it is wanted."""

from collections.abc import Iterator, Sequence
from typing import overload

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.data.passage_table import PassageTable
from fedrag_jax.models.pooling import Use


class PassageTexts(Sequence[str]):
    """Texts [N] of passages, with the encoder's prompt.

    Args:
      use: of the encoder, which has the prompt.
    """

    def __init__(self, passages: Sequence[Passage], use: Use):
        self.passages, self.use = passages, use

    @property
    def fingerprint(self) -> str:
        """Equal for equal texts out of one table; "" of passages that are in memory."""
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
