"""A bi-encoder with an embedded corpus: finds passages for questions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_jax.clock import Clock, Spent
from fedrag_jax.data.examples import Passage, embedding_text, require_whole
from fedrag_jax.errors import ConfigError
from fedrag_jax.models import sentence_folders
from fedrag_jax.models.hub import Pretrained
from fedrag_jax.models.network import Network
from fedrag_jax.retrieval.embedding import embed_corpus, embed_texts
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.vector_index import Index, MakesIndex
from fedrag_jax.retrieval.passage_texts import PassageTexts
from fedrag_jax.retrieval.similarity import passage_side, question_side


@dataclasses.dataclass(frozen=True)
class Retriever:
    """Query and document encoders, which share a network but may differ in parameters, and an index.

    Attributes:
      bare_vectors: [N, D] passage vectors from the document encoder.
      vectors: [N, D] searched passage vectors: after the head, and converted so that the index's inner
        product is the encoder's similarity (`retrieval.similarity`).
      index: the index that is searched, or silos with one index each (`index.silos.over_silos`). A
        refreshed retriever has an index of the same kind.
      head: matrix [D, d] applied to vectors of questions and passages, of which it may leave a part
        (d < D); None for none.
      dtype: type of stored passage vectors, float32 or float16.
      spent: seconds of embedding passages and of searching, for this retriever and all retrievers
        derived from it by tuning.
    """

    encoder: Network
    tokenizer: Any
    query: Any
    document: Any
    passages: Sequence[Passage]
    bare_vectors: np.ndarray
    vectors: np.ndarray
    index: Index
    head: np.ndarray | None = None
    dtype: str = "float32"
    spent: Spent = dataclasses.field(default_factory=Spent)

    @classmethod
    def build(
        cls,
        model: Pretrained,
        passages: Sequence[Passage],
        progress: bool = False,
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        similarity: str | None = None,
        dtype: str = "float32",
        index: MakesIndex = FaissIndex.build,
        head: np.ndarray | None = None,
    ):
        """Embeds the corpus (or reads its vectors from the disk cache) and indexes it.

        Without passages, the retriever only embeds questions and passages for a store.

        Args:
          query_prompt, document_prompt: prefix of every question and passage, in search and in
            training; default: the model's own.
          similarity: "cosine", "dot" or "euclidean"; default: the model's own.
          dtype: type of stored passage vectors, "float32" or "float16".
          index: function that builds the index, such as from `index.by_name.index_kind`.
          head: matrix [D, d] applied to all vectors before they are indexed; default: none.

        Raises:
          ConfigError: another similarity or dtype, float16 with the euclidean similarity, or a
            prompt that leaves no room for a text.
        """
        model = sentence_folders.used_as(model, query_prompt, document_prompt, similarity)
        if (dtype, model.network.config.similarity) == ("float16", "euclidean"):
            raise ConfigError(
                "float16 cannot hold the squared lengths of vectors, which the euclidean similarity "
                'needs: use dtype "float32", or similarity "cosine" or "dot"'
            )
        vectors = np.empty((0, model.network.config.size), np.float32)
        both = model.params, model.params
        head = None if head is None else np.asarray(head)
        parts = model.network, model.tokenizer, *both, passages, vectors, vectors, None
        bare = cls(*parts, head=head, dtype=dtype)
        bare._require_room()
        if len(passages):
            vectors = bare._embedded(passages, model.params, keep=True, progress=progress)
        built = bare.with_vectors(vectors)
        return built if index == FaissIndex.build else built.searched_by(index)

    def refresh(self, document) -> "Retriever":
        """Returns the retriever with new document parameters: the corpus is re-embedded and
        re-indexed."""
        vectors = self.embed_passages(document)
        return dataclasses.replace(self, document=document).with_vectors(vectors)

    def _behind_head(self) -> "Retriever":
        vectors = passage_side(self.bare_vectors, self.encoder.config, self.head)
        index, clock = self.index, Clock()
        if index is not None:
            index = index.with_vectors(vectors)
        elif len(self.passages):
            index = FaissIndex.build(vectors)
        self.spent.searching += clock.lap().others
        return dataclasses.replace(self, vectors=vectors, index=index)

    def embed_passages(self, document, rows=None) -> np.ndarray:
        """Embeds passages, all or those at `rows` int [R], with document parameters; returns [R, D]."""
        passages = self.passages if rows is None else [self.passages[int(r)] for r in rows]
        return self._embedded(passages, document, keep=False)

    def embed_kept(self, passages: Sequence[Passage], progress: bool = False) -> np.ndarray:
        """As `embed_new`, with the disk cache."""
        vectors = self._embedded(passages, self.document, keep=True, progress=progress)
        return passage_side(vectors, self.encoder.config, self.head)

    def embed_new(self, passages: Sequence[Passage]) -> np.ndarray:
        """Returns searchable vectors [N, D] of any passages.

        Raises:
          DataError: a passage that contains half a character.
        """
        for passage in passages:
            require_whole(embedding_text(passage), f"passage {passage.id!r}")
        vectors = embed_texts(
            self.encoder,
            self.document,
            self.tokenizer,
            self.passage_texts(passages),
            max_length=self.encoder.config.max_length,
        )
        return passage_side(vectors, self.encoder.config, self.head)

    def _embedded(self, passages: Sequence[Passage], document, **how) -> np.ndarray:
        return embed_corpus(
            self.encoder,
            document,
            self.tokenizer,
            PassageTexts(passages, self.encoder.config),
            max_length=self.encoder.config.max_length,
            dtype=self.dtype,
            spent=self.spent,
            **how,
        )

    @property
    def passage_room(self) -> int:
        """Maximum tokens of a passage for the document encoder, without its prompt and special
        tokens."""
        return self._room(self.encoder.config.passage_text(""))

    def _room(self, prompt: str) -> int:
        return self.encoder.config.max_length - len(self.tokenizer(prompt)["input_ids"])

    def _require_room(self) -> None:
        config = self.encoder.config
        for prompt in filter(None, (config.query_prompt, config.document_prompt)):
            if self._room(prompt) < 1:
                raise ConfigError(
                    f"the encoder reads {config.max_length} tokens, and its prompt {prompt[:80]!r} "
                    "leaves no room for a text: shorten it"
                )

    def passage_texts(self, passages: Sequence[Passage]) -> Sequence[str]:
        """Returns the texts of passages for the document encoder, including its prompt."""
        return PassageTexts(passages, self.encoder.config)

    def question_texts(self, questions: Sequence[str]) -> list[str]:
        """Returns the texts of questions for the query encoder, including its prompt."""
        return [self.encoder.config.question_text(q) for q in questions]

    def with_vectors(self, bare_vectors) -> "Retriever":
        """Returns the retriever with an index of these vectors [N, D], even if they are stale."""
        bare_vectors = np.asarray(bare_vectors).astype(self.dtype, copy=False)
        return dataclasses.replace(self, bare_vectors=bare_vectors)._behind_head()

    def searched_by(self, make: MakesIndex) -> "Retriever":
        """Returns the retriever with the same vectors in another kind of index.

        Args:
          make: function that builds the index, such as from `index.by_name.index_kind`.

        Raises:
          ConfigError: options that do not fit the vectors.
        """
        if not len(self.passages):
            return self
        clock = Clock()
        index = make(self.vectors)
        self.spent.searching += clock.lap().others
        return dataclasses.replace(self, index=index)

    def with_query(self, query) -> "Retriever":
        """Returns the retriever with new query parameters over the same document vectors."""
        return dataclasses.replace(self, query=query)

    def with_head(self, head) -> "Retriever":
        """Returns the retriever with another head after both encoders, or none; nothing is
        re-embedded."""
        head = None if head is None else np.asarray(head)
        return dataclasses.replace(self, head=head)._behind_head()

    def cut(self, dimensions: int) -> "Retriever":
        """Returns the retriever with vectors truncated to `dimensions` (Matryoshka, 2205.13147)."""
        whole = np.eye(self.bare_vectors.shape[1], dtype=np.float32)
        return self.with_head((whole if self.head is None else self.head)[:, :dimensions])

    def embed_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Returns the query encoder's vectors, float32 [Q, D], for searching passages.

        Raises:
          DataError: a question that contains half a character.
        """
        for question in questions:
            require_whole(question, f"the question {question[:80]!r}")
        vectors = embed_texts(
            self.encoder,
            self.query,
            self.tokenizer,
            self.question_texts(questions),
            max_length=self.encoder.config.max_length,
        )
        return question_side(vectors, self.encoder.config, self.head)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns corpus rows int32 [Q, k] and similarities float32 [Q, k], best first."""
        clock = Clock()
        found = self.index.search(self.embed_questions(questions), k)
        self.spent.searching += clock.lap().others
        return found

    def search_within(
        self, questions: Sequence[str], pools: Sequence[np.ndarray], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but each question searches only its own pool of corpus rows, int [n].

        Raises:
          ConfigError: fewer than k rows for a question.
        """
        if least := [len(pool) for pool in pools if len(pool) < k]:
            raise ConfigError(f"{k} passages are needed, but a question may see only {min(least)}")
        queries, clock = self.embed_questions(questions), Clock()
        found = [self.nearest(query, pool, k) for query, pool in zip(queries, pools, strict=True)]
        self.spent.searching += clock.lap().others
        rows, similarities = zip(*found, strict=True)
        return np.stack(rows), np.stack(similarities)

    def nearest(self, query: np.ndarray, pool, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the at most `most` rows of a pool int [n] nearest to a vector [D], and
        similarities."""
        rows = np.asarray(pool, np.int32)
        found = self.vectors[rows] @ query
        best = np.lexsort((rows, -found))[:most]
        return rows[best], found[best]

    def similarities(self, questions: Sequence[str], read) -> np.ndarray:
        """Returns similarities float32 [Q, k] of questions with k corpus rows or passages each."""
        asked = self.embed_questions(questions)
        if isinstance(read[0][0], Passage):
            passages = self.embed_new([passage for some in read for passage in some])
            passages = passages.reshape(len(read), -1, passages.shape[1])
        else:
            passages = self.vectors[np.asarray(read)]
        return np.einsum("qd,qkd->qk", asked, passages)
