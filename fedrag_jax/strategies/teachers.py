"""Generator scores of (question, passage) pairs, for `distillation.distilled`."""

from collections.abc import Callable, Sequence

import numpy as np

from fedrag_jax.data.prompts import ASK, plain
from fedrag_jax.data.spelling import Spelling
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
    spelling, ending = Spelling(tokenizer), after + ASK.question
    opening, closing = spelling([before, ending])

    def prompt(text: str) -> np.ndarray:
        text = plain(tokenizer, text)
        if spelling.adds_up:
            return np.array([*opening, *spelling.whole(text)[:longest], *closing], np.int32)
        text, _ = spelling.cut(text, longest)
        return np.array(spelling.whole(before + text + ending), np.int32)

    def score(questions, texts):
        asked = [
            np.array(spelling.after(ending, f" {plain(tokenizer, question)}"), np.int32)
            for question in questions
        ]
        prompts = [[prompt(text)] for text in texts]
        found = sequence_log_probs(system.writer, prompts, asked)
        return np.array([total / len(y) for (total,), y in zip(found, asked, strict=True)])

    return score
