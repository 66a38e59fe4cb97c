"""Answers judged by a model, which decides several times whether they are right."""

import pathlib
from collections.abc import Sequence

import numpy as np

from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.author import Author
from fedrag_jax.label_free.prompts import JUDGE, Ask
from fedrag_jax.label_free.replies import replies


def judged(
    author: Author,
    examples: Sequence[Example],
    texts: Sequence[str],
    answers: Sequence[str],
    folder: pathlib.Path,
    *,
    repeats: int = 3,
    temperature: float = 1.0,
    ask: Ask = JUDGE,
) -> np.ndarray:
    """Returns the author's verdicts on answers: float [repeats, Q], 1 right, 0 wrong, NaN unparsable.

    Repeats show the variation of the judge, which a single verdict hides.

    Args:
      texts: the gold passage of each example.
      answers: the answers to judge; the reference is the example's first answer.
      folder: folder of the stored replies, which are not requested again.
      temperature: temperature of all repeats but the first, which is greedy.

    Raises:
      ConfigError: repeats below 1, or stored replies to other prompts or settings.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {repeats}")
    about = {
        e.id: {"text": t, "question": e.question, "reference": e.answer, "answer": a}
        for e, t, a in zip(examples, texts, answers, strict=True)
    }
    verdicts = np.full((repeats, len(examples)), np.nan)
    for i in range(repeats):
        how = {"temperature": temperature * (i > 0), "seed": i}
        found = replies(author, ask, about, folder / f"judged_{i}.jsonl", "judge", **how)
        for j, e in enumerate(examples):
            if found[e.id].said:
                verdicts[i, j] = found[e.id].said["verdict"] == "TRUE"
    return verdicts
