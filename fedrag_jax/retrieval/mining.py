"""Hard negatives: passages that the retriever ranks high although they are wrong."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.retriever import Retriever


class Mining(NamedTuple):
    """Settings for hard negatives of a question (NV-Retriever, 2407.15831, section 3).

    A passage as near to the question as its gold passage may also answer it: a false negative. With
    the similarity p of the nearest gold passage, a passage is left out if its similarity is above
    `share` x p (TopK-PercPos) or above p - `margin` (TopK-MarginPos).

    Attributes:
      count: number of negatives per question; fewer if there are no more.
      depth: number of nearest passages to consider, including gold ones.
      share: factor of p; 0.95 was the paper's best. 1 leaves out passages nearer than the gold passage.
      margin: distance below p; the paper's best was 0.05, for cosines.

    Raises:
      ConfigError: raised by `hard_negatives`, for a number out of its range.
    """

    count: int = 1
    depth: int = 50
    share: float = 0.95
    margin: float = 0.0


def hard_negatives(
    retriever: Retriever,
    examples: Sequence[Example],
    golds: np.ndarray,
    mining: Mining,
    pool: Pool | None = None,
) -> np.ndarray:
    """Returns the nearest passages to each question that are probably wrong for it.

    Args:
      golds: int [Q, G] corpus rows of gold passages, padded with -1; at least one per question.
      pool: `pool(example)`: the corpus rows to choose from; default: all.

    Returns:
      int32 [Q, count] corpus rows, nearest first, padded with -1.
    """
    if mining.count < 1 or mining.depth < 1 or not 0 < mining.share <= 1 or mining.margin < 0:
        raise ConfigError(
            "mining needs count and depth of at least 1, 0 < share <= 1 and margin >= 0, "
            f"got {mining}"
        )
    queries = retriever.embed_questions([e.question for e in examples])
    depth = min(mining.depth, len(retriever.passages))
    if pool is None:
        rows, cosines = retriever.index.search(queries, depth)
    found = np.full((len(examples), mining.count), -1, np.int32)
    for i, example in enumerate(examples):
        if pool is None:
            near, cosine = rows[i], cosines[i]
        else:
            near, cosine = retriever.nearest(queries[i], pool(example), depth)
        own = golds[i][golds[i] >= 0]
        positive = (retriever.vectors[own] @ queries[i]).max()
        # Where p is negative, a share of it would be nearer than it.
        highest = positive - max(abs(positive) * (1 - mining.share), mining.margin)
        wrong = near[(cosine <= highest) & ~np.isin(near, own)][: mining.count]
        found[i, : len(wrong)] = wrong
    return found
