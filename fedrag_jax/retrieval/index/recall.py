"""What an approximate index finds of what an exact one would."""

from collections.abc import Sequence

import numpy as np

from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.retriever import Retriever


def index_recall(retriever: Retriever, questions: Sequence[str], k: int) -> np.ndarray:
    """Of the k passages nearest to each question the share [Q] that the retriever's index finds.

    Raises:
      ConfigError: k below 1 or above the corpus.
    """
    vectors = retriever.embed_questions(questions)
    found, _ = retriever.index.search(vectors, k)
    nearest, _ = FaissIndex.build(None, retriever.vectors).search(vectors, k)
    return np.array([np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)])
