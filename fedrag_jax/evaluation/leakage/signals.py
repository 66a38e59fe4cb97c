"""What attackers read off a system: a loss for each question, whichever part was trained.

`evaluator.answer_nll` is that of the generator.
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
    """-log p [Q] of the first gold passage in a softmax of scaled similarities over the corpus, in
    nats: the loss of query-side tuning with all passages for negatives.

    Raises:
      DataError: a question without a gold passage, or with one that is not in the corpus.
    """
    row = {identifier: i for i, identifier in enumerate(ids_of(retriever.passages))}
    golds = [e.positive_ids[0] if e.positive_ids else "" for e in examples]
    if strange := [e.id for e, gold in zip(examples, golds, strict=True) if gold not in row]:
        raise DataError(
            f"question {strange[0]!r} names no gold passage of the corpus, and its loss is that of one"
        )
    questions = retriever.embed_questions([e.question for e in examples])
    scores = score_scale * questions @ np.asarray(retriever.vectors, np.float32).T
    gold = scores[np.arange(len(examples)), [row[g] for g in golds]]
    return logsumexp(scores.astype(np.float64), axis=1) - gold
