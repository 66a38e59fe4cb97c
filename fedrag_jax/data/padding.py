"""Rows of tokens of different lengths as padded arrays."""

from collections.abc import Sequence

import numpy as np


def left_padded(rows: Sequence[np.ndarray], pad: int, multiple: int = 32) -> tuple[np.ndarray, ...]:
    """Left-pads rows to `tokens`, `mask` [B, T], where T is a multiple of `multiple`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    tokens = np.full((len(rows), width), pad, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return tokens, mask


def clipped(text: str, tokens: int) -> str:
    """Returns the beginning of a text with more than `tokens` tokens, to avoid tokenising the rest."""
    return text[: 64 * tokens]


def encoder_table(tokenizer, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
    """Tokenises texts for an encoder: `tokens`, `mask` [N, T], right-padded to the longest."""
    texts = [clipped(text, max_length) for text in texts]
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    width = max(len(row) for row in rows)
    tokens = np.full((len(rows), width), tokenizer.pad_token_id or 0, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return {"tokens": tokens, "mask": mask}
