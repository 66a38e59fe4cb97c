"""Recall of an approximate index against an exact one."""

from collections.abc import Sequence

import numpy as np

from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.retriever import Retriever


def index_recall(retriever: Retriever, questions: Sequence[str], k: int) -> np.ndarray:
    """Returns the share [Q] of each question's k nearest passages that the retriever's index finds.

    Raises:
      ConfigError: k below 1 or above the corpus.
    """
    vectors = retriever.embed_questions(questions)
    found, _ = retriever.index.search(vectors, k)
    nearest, _ = FaissIndex.build(retriever.vectors).search(vectors, k)
    return np.array([np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)])
