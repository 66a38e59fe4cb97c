"""The name of 0.1.0 for `fedrag_jax.retrieval.stores.bm25`; it goes with version 1.0."""

import warnings

from fedrag_jax.retrieval.stores.bm25 import BM25Store as WordStore

__all__ = ["WordStore"]

warnings.warn(
    f"{__name__}.WordStore is fedrag_jax.retrieval.stores.bm25.BM25Store now",
    DeprecationWarning,
    stacklevel=2,
)
