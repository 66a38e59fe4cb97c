"""Multiple choice by likelihood: log p of each choice after the prompt, without generation."""

from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.batching import Prompts
from fedrag_jax.generation import inference
from fedrag_jax.generation.text import Writer


def choice_tokens(prompts: Prompts, choice: str) -> np.ndarray:
    """Returns the tokens of a choice after a prompt, int [A], without EOS."""
    return np.array(prompts.spelled(choice), np.int32)


def log_likelihoods(
    writer: Writer, asked: Sequence[np.ndarray], choices: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Returns log p(choice | prompt), float64 [Q][C], summed over a choice's tokens.

    Args:
      asked: int [T], the prompt of each question.
      choices: int [Q][C][A], from `choice_tokens`.
    """
    if all(len(c) == 1 for some in choices for c in some):  # letters: each prompt is read once
        return inference.next_token_log_probs(writer, asked, [np.concatenate(c) for c in choices])
    pairs = [(prompt, c) for prompt, some in zip(asked, choices, strict=True) for c in some]
    scored = inference.sequence_log_probs(writer, [[p] for p, _ in pairs], [c for _, c in pairs])
    found = iter(np.concatenate(scored)) if scored else iter(())
    return [np.array([next(found) for _ in some]) for some in choices]
