"""Answers judged by a model that is asked whether they are right, several times."""

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
    """What the author makes of answers: float [repeats, Q], 1 for right, 0 for wrong, NaN for neither.

    A mean over repeats has the spread of the judge in it, which a single verdict hides.

    Args:
      texts: the gold passage of each example.
      answers: to be judged; the reference is the example's first.
      folder: where its replies are kept; what is there is not asked again.
      temperature: of all but the first repeat, which is the likeliest verdict.

    Raises:
      ConfigError: repeats below 1, or replies in the folder that were asked otherwise.
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
