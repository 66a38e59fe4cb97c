"""Hard negatives: what the retriever takes for an answer and is none."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.retriever import Retriever


class Mining(NamedTuple):
    """Which passages count as hard negatives of a question (NV-Retriever, 2407.15831, section 3).

    What is as near to the question as its gold passage may well answer it too: a false negative. With
    the similarity p of the nearest gold passage, a passage is left out above `share` x p
    (TopK-PercPos) or above p - `margin` (TopK-MarginPos).

    Attributes:
      count: of each question; fewer where there are no more.
      depth: passages that are looked at, nearest first, gold ones among them.
      share: of p; 0.95 was the paper's best. 1 leaves out what is nearer than the gold passage.
      margin: below p; the paper's best was 0.05, of cosines.

    Raises:
      ConfigError: from `hard_negatives`, a number out of its range.
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
    """The nearest passages to each question that are wrong for it, as far as can be told.

    Args:
      golds: int [Q, G] corpus rows, padded with -1; at least one each.
      pool: `pool(example)`, the corpus rows that may be taken; all, unless given.

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
