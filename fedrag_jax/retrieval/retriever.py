"""A bi-encoder and the corpus it has embedded: questions in, passages out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_jax.clock import Clock, tell
from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.models.hub import Pretrained
from fedrag_jax.models.network import Network
from fedrag_jax.retrieval.embedding import embed_corpus, embed_texts
from fedrag_jax.retrieval.faiss_store import FaissStore


@dataclasses.dataclass(frozen=True)
class Retriever:
    """Query and document encoders, which share a network and may differ in parameters, and an index.

    Attributes:
      vectors: float32 [N, D], normalised, so that the store's inner product is the cosine.
    """

    encoder: Network
    tokenizer: Any
    query: Any
    document: Any
    passages: Sequence[Passage]
    vectors: np.ndarray
    store: FaissStore

    @classmethod
    def build(cls, model: Pretrained, passages: Sequence[Passage], progress: bool = False):
        """Embeds the corpus (from the disk cache where it was embedded before) and indexes it."""
        bare = cls(model.network, model.tokenizer, model.params, None, passages, None, None)
        return bare._indexed(model.params, progress=progress)

    def refresh(self, document) -> "Retriever":
        """The same corpus seen by document parameters in training: re-embedded and re-indexed."""
        return self._indexed(document, keep=False)

    def _indexed(self, document, **how) -> "Retriever":
        vectors = embed_corpus(
            self.encoder,
            document,
            self.tokenizer,
            [embedding_text(p) for p in self.passages],
            max_length=self.encoder.config.max_length,
            **how,
        )
        vectors = _normalised(vectors)
        store = FaissStore.build([p.id for p in self.passages], vectors)
        return dataclasses.replace(self, document=document, vectors=vectors, store=store)

    def with_query(self, query) -> "Retriever":
        """Query-side tuning: new query parameters over the same document vectors."""
        return dataclasses.replace(self, query=query)

    def embed_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Normalised vectors float32 [Q, D] of the query encoder."""
        vectors = embed_texts(
            self.encoder,
            self.query,
            self.tokenizer,
            questions,
            max_length=self.encoder.config.max_length,
        )
        return _normalised(vectors)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus rows int32 [Q, k] and cosines float32 [Q, k], best first."""
        clock = Clock()
        found = self.store.search(self.embed_questions(questions), k)
        tell("searching", clock.lap().others)
        return found


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
