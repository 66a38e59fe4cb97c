"""Generator scores of (question, passage) pairs, for `distillation.distilled`."""

from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.prompts import ASK
from fedrag_jax.generation.inference import sequence_log_probs
from fedrag_jax.rag import RAGSystem


def question_likelihood(
    system: RAGSystem,
) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Returns a score: the likelihood of the question given a passage, mean log p(x_t | z, x_<t).

    Unsupervised passage re-ranking (Sachan et al. 2022, 2204.07496, section 2.2). It needs no answers.

    Returns:
      `score(questions, texts) -> float [P]`, one score per pair.
    """
    tokenizer, longest = system.prompts.tokenizer, system.prompts.max_passage_tokens
    before, after = ASK.passage.split("{text}")

    def tokens(texts: list[str]) -> list[np.ndarray]:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [np.array(row, np.int32) for row in rows]

    def score(questions, texts):
        asked = tokens([f" {question}" for question in questions])
        opening, closing = tokens([before, after + ASK.question])
        prompts = [
            [np.concatenate([opening, text[:longest], closing])] for text in tokens(list(texts))
        ]
        found = sequence_log_probs(system.writer, prompts, asked)
        return np.array([total / len(y) for (total,), y in zip(found, asked, strict=True)])

    return score
