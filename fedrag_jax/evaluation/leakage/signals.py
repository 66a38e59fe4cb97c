"""The signal that membership attacks use: a loss for each question.

This module has the retriever's loss; `evaluator.answer_nll` is the generator's.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

from fedrag_jax.data.examples import Example, ids_of
from fedrag_jax.errors import DataError
from fedrag_jax.retrieval.retriever import Retriever


def ranking_nll(
    retriever: Retriever, examples: Sequence[Example], score_scale: float = 20.0
) -> np.ndarray:
    """Returns -log p [Q] of the first gold passage, in nats.

    p is a softmax of scaled similarities over the corpus. This is the loss of query-side tuning with
    all passages as negatives.

    Raises:
      DataError: a question without a gold passage, or with one that is not in the corpus.
    """
    row = {identifier: i for i, identifier in enumerate(ids_of(retriever.passages))}
    golds = [e.positive_ids[0] if e.positive_ids else "" for e in examples]
    if strange := [e.id for e, gold in zip(examples, golds, strict=True) if gold not in row]:
        raise DataError(
            f"question {strange[0]!r} has no gold passage in the corpus, so it has no ranking loss"
        )
    questions = retriever.embed_questions([e.question for e in examples])
    scores = score_scale * questions @ np.asarray(retriever.vectors, np.float32).T
    gold = scores[np.arange(len(examples)), [row[g] for g in golds]]
    return logsumexp(scores.astype(np.float64), axis=1) - gold
