"""Passages as the parts of prompts: tokens, or texts where a tokenizer spells prompts whole."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrag_jax.data.cache import cache_folder
from fedrag_jax.data.examples import Passage, reading_text, require_whole
from fedrag_jax.data.padding import clipped
from fedrag_jax.data.passage_table import PassageTable
from fedrag_jax.data.prompts import plain
from fedrag_jax.data.seeds import stream
from fedrag_jax.data.spelling import Spelling, definition

_AT_ONCE = 4096  # passages of a table tokenised together
_SAMPLE = 10_000  # passages whose lengths stand for those of a table that is spelled whole


class PassageParts:
    """The truncated tokens int32 [n] of each passage, or its truncated text.

    Only a passage's own text is truncated; what `around` has after it stays. Parts of a list are
    computed at once and kept in memory. Parts of a table are kept on disk and memory-mapped; as texts,
    they are computed on demand.

    Args:
      around: the text around a passage, with {text} for its own text.
      most: maximum tokens of a part.

    Attributes:
      lengths: int [N], tokens of each part; for texts of a table, of a sample.
      ending: the tokens after a passage's own text, such as a line break.

    Raises:
      DataError: a passage that contains half a character.
    """

    def __init__(
        self, tokenizer, spelling: Spelling, around: str, most: int, passages: Sequence[Passage]
    ):
        self._tokenizer, self._spelling, self._around = tokenizer, spelling, around
        self._most, self._after = most, around.partition("{text}")[2]
        self.ending = spelling.after("A text.", self._after)
        self._rows: Any
        if not isinstance(passages, PassageTable):
            self._rows, self.lengths = self._of(passages)
        elif spelling.adds_up:
            self._rows = self._on_disk(passages)
            self.lengths = np.diff(self._rows.starts)
        else:
            drawn = stream(0, "lengths of passages").permutation(len(passages))[:_SAMPLE]
            self._rows = _MadeWhenRead(self, passages)
            self.lengths = self._of([passages[int(row)] for row in drawn])[1]

    def __getitem__(self, row: int):
        return self._rows[row]

    def of(self, passage: Passage):
        """Returns the part of any passage."""
        return self._of([passage])[0][0]

    def _of(self, passages: Sequence[Passage]) -> tuple[list, np.ndarray]:
        for passage in passages:
            require_whole(reading_text(passage), f"passage {passage.id!r}")
        most = self._most
        texts = [
            self._around.format(text=plain(self._tokenizer, clipped(reading_text(p), most)))
            for p in passages
        ]
        if self._spelling.adds_up:
            parts = [self.fitted(tokens, most) for tokens in self._spelling(texts)]
            return parts, np.array([len(p) for p in parts], int)
        cut = [self._fitted_text(text, most) for text in texts]
        return [text for text, _ in cut], np.array([length for _, length in cut], int)

    def fitted(self, tokens: Sequence[int], most: int) -> np.ndarray:
        """Returns tokens that end with a passage, truncated to `most` before the passage's ending."""
        if len(tokens) > most:
            tokens = [*tokens[: max(most - len(self.ending), 0)], *self.ending][:most]
        return np.array(tokens, np.int32)

    def _fitted_text(self, text: str, most: int) -> tuple[str, int]:
        """Returns the text and its number of tokens."""
        whole, length = self._spelling.cut(text, most)
        if whole == text:
            return whole, length
        most = max(most - len(self.ending), 0)
        return self._spelling.cut(text, most)[0] + self._after, most + len(self.ending)

    def _on_disk(self, passages: PassageTable) -> "_Tokens":
        about = (
            f"{passages.fingerprint} {definition(self._tokenizer)} {self._around!r} {self._most} "
            "with endings"
        )
        folder = cache_folder() / "tokens" / hashlib.sha256(about.encode()).hexdigest()
        starts, tokens = folder / "starts.npy", folder / "tokens.bin"
        if not starts.exists():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            lengths = []
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                for start in range(0, len(passages), _AT_ONCE):
                    parts, some = self._of(passages[start : start + _AT_ONCE])
                    lengths.append(some)
                    file.write(np.concatenate(parts).tobytes())
            os.replace(file.name, tokens)
            ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                np.save(file, np.concatenate([[0], ends]), allow_pickle=False)
            os.replace(file.name, starts)
        return _Tokens(tokens, starts)


class _Tokens:
    """The concatenated tokens of passages in a memory-mapped file."""

    def __init__(self, tokens: Path, starts: Path):
        self.starts = np.load(starts, mmap_mode="r", allow_pickle=False)
        self._tokens = np.memmap(tokens, np.int32, "r", shape=(int(self.starts[-1]),))

    def __getitem__(self, row: int) -> np.ndarray:
        return np.array(self._tokens[self.starts[row] : self.starts[row + 1]])


class _MadeWhenRead:
    def __init__(self, parts: PassageParts, passages: PassageTable):
        self._parts, self._passages = parts, passages

    def __getitem__(self, row: int):
        return self._parts.of(self._passages[int(row)])
