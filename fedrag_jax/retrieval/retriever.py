"""A bi-encoder and the corpus it has embedded: questions in, passages out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_jax.clock import Clock, tell
from fedrag_jax.data.examples import Passage, embedding_text, half_character
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models.hub import Pretrained
from fedrag_jax.models.network import Network
from fedrag_jax.retrieval.embedding import embed_corpus, embed_texts
from fedrag_jax.retrieval.faiss_store import FaissStore
from fedrag_jax.retrieval.store import Searched


@dataclasses.dataclass(frozen=True)
class Retriever:
    """Query and document encoders, which share a network and may differ in parameters, and an index.

    Attributes:
      bare_vectors: float32 [N, D] of the passages, as the document encoder gives them.
      vectors: float32 [N, D], those that are searched: behind the head, and of length 1, so that the
        store's inner product is the cosine.
      store: what searches them: an index, or silos that have one each (`federated.over_silos`). A
        refreshed retriever has one of the same kind.
      head: a matrix [D, D] that vectors of questions and passages are multiplied with; None for none.
    """

    encoder: Network
    tokenizer: Any
    query: Any
    document: Any
    passages: Sequence[Passage]
    bare_vectors: np.ndarray
    vectors: np.ndarray
    store: Searched
    head: np.ndarray | None = None

    @classmethod
    def build(cls, model: Pretrained, passages: Sequence[Passage], progress: bool = False):
        """Embeds the corpus (from the disk cache where it was embedded before) and indexes it.

        Without passages it embeds questions and passages for a store elsewhere, and searches nothing.
        """
        vectors = np.empty((0, model.network.config.hidden_size), np.float32)
        if passages:
            vectors = embed_corpus(
                model.network,
                model.params,
                model.tokenizer,
                [embedding_text(p) for p in passages],
                max_length=model.network.config.max_length,
                progress=progress,
            )
        both = model.params, model.params
        bare = cls(model.network, model.tokenizer, *both, passages, vectors, None, None)
        return bare._behind_head()

    def refresh(self, document) -> "Retriever":
        """The same corpus seen by document parameters in training: re-embedded and re-indexed."""
        vectors = self.embed_passages(document)
        return dataclasses.replace(self, document=document).with_vectors(vectors)

    def _behind_head(self) -> "Retriever":
        vectors = headed(self.bare_vectors, self.head)
        store = self.store
        if store is not None:
            store = store.with_vectors(vectors)
        elif self.passages:
            store = FaissStore.build([p.id for p in self.passages], vectors)
        return dataclasses.replace(self, vectors=vectors, store=store)

    def embed_passages(self, document, rows=None) -> np.ndarray:
        """Vectors [R, D] that document parameters give to passages, all or those at `rows` int [R]."""
        passages = self.passages if rows is None else [self.passages[r] for r in rows]
        return embed_corpus(
            self.encoder,
            document,
            self.tokenizer,
            [embedding_text(p) for p in passages],
            max_length=self.encoder.config.max_length,
            keep=False,
        )

    def embed_new(self, passages: Sequence[Passage]) -> np.ndarray:
        """Vectors [N, D] of unit length, behind the head, of passages of anywhere."""
        vectors = embed_texts(
            self.encoder,
            self.document,
            self.tokenizer,
            [embedding_text(p) for p in passages],
            max_length=self.encoder.config.max_length,
        )
        return headed(vectors, self.head)

    def with_vectors(self, bare_vectors) -> "Retriever":
        """An index of these vectors [N, D], however old they are."""
        return dataclasses.replace(self, bare_vectors=np.asarray(bare_vectors))._behind_head()

    def with_query(self, query) -> "Retriever":
        """Query-side tuning: new query parameters over the same document vectors."""
        return dataclasses.replace(self, query=query)

    def with_head(self, head) -> "Retriever":
        """Another head after both encoders, or none: nothing is embedded anew."""
        head = None if head is None else np.asarray(head)
        return dataclasses.replace(self, head=head)._behind_head()

    def cut(self, dimensions: int) -> "Retriever":
        """The same with vectors cut to their first so many dimensions (Matryoshka, 2205.13147)."""
        whole = np.eye(self.bare_vectors.shape[1], dtype=np.float32)
        return self.with_head((whole if self.head is None else self.head)[:, :dimensions])

    def embed_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Normalised vectors float32 [Q, D] of the query encoder.

        Raises:
          DataError: a question with half a character in it.
        """
        for question in questions:
            if fault := half_character(question):
                raise DataError(f"the question {question[:80]!r} {fault}")
        vectors = embed_texts(
            self.encoder,
            self.query,
            self.tokenizer,
            questions,
            max_length=self.encoder.config.max_length,
        )
        return headed(vectors, self.head)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus rows int32 [Q, k] and cosines float32 [Q, k], best first."""
        clock = Clock()
        found = self.store.search(self.embed_questions(questions), k)
        tell("searching", clock.lap().others)
        return found

    def search_within(
        self, questions: Sequence[str], pools: Sequence[np.ndarray], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, each question among corpus rows of its own, int [n] each.

        Raises:
          ConfigError: fewer than k rows for a question.
        """
        if least := [len(pool) for pool in pools if len(pool) < k]:
            raise ConfigError(f"{k} passages are wanted, and a question may see {min(least)} alone")
        queries, clock = self.embed_questions(questions), Clock()
        found = [self.nearest(query, pool, k) for query, pool in zip(queries, pools, strict=True)]
        tell("searching", clock.lap().others)
        rows, cosines = zip(*found, strict=True)
        return np.stack(rows), np.stack(cosines)

    def nearest(self, query: np.ndarray, pool, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a pool int [n] nearest to a vector [D], at most so many, and their cosines."""
        rows = np.asarray(pool, np.int32)
        cosines = self.vectors[rows] @ query
        best = np.lexsort((rows, -cosines))[:most]
        return rows[best], cosines[best]

    def cosines(self, questions: Sequence[str], read) -> np.ndarray:
        """Cosines float32 [Q, k] of questions with k corpus rows or passages each."""
        asked = self.embed_questions(questions)
        if isinstance(read[0][0], Passage):
            passages = self.embed_new([passage for some in read for passage in some])
            passages = passages.reshape(len(read), -1, passages.shape[1])
        else:
            passages = self.vectors[np.asarray(read)]
        return np.einsum("qd,qkd->qk", asked, passages)


def headed(vectors, head=None):
    """Vectors [..., D], of NumPy or JAX, times a head [D, E] if there is one, at unit length.

    So an inner product of two is a cosine.
    """
    vectors = vectors if head is None else vectors @ head
    return vectors / ((vectors**2).sum(-1, keepdims=True) ** 0.5).clip(1e-9)
