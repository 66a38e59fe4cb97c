"""Passages searched by their words: BM25.

pip install 'fedrag-jax[bm25]'
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.retrieval.stores.knowledge import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.lines import LINES, read_lines, write_lines

STEMMED = ("arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek",
           "hungarian", "italian", "norwegian", "portuguese", "romanian", "russian", "spanish",
           "swedish", "tamil", "turkish")  # fmt: skip
MOST_WORDS = 1024  # different ones of a question that are looked for: a page of them, and no book
HEAP = (
    15_000_000  # bytes that are filled before a part of the index is made; the fewest there may be
)


class WordStore(KnowledgeStore):
    """An inverted index of titles and texts, in memory, by the library tantivy.

        score = sum over words w of the question: idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avg))

    with k1 = 1.2 and b = 0.75 (Robertson and Zaragoza 2009). Words are runs of letters and digits, in
    lower case. What is deleted is counted in idf until the store is saved.
    """

    kind, cosines = "bm25", False

    def __init__(self, language: str = ""):
        """An empty store.

        Args:
          language: whose endings are taken off words ("english"); none unless given.

        Raises:
          ConfigError: a language without a stemmer, or tantivy is missing.
        """
        super().__init__()
        if language and language not in STEMMED:
            raise ConfigError(f"language must be one of {STEMMED}, or empty, got {language!r}")
        tantivy, self.language = _tantivy(), language
        builder = (
            tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
            .filter(tantivy.Filter.remove_long(255))
            .filter(tantivy.Filter.lowercase())
        )
        if language:
            builder = builder.filter(tantivy.Filter.stemmer(language))
        self._words = builder.build()
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("id", stored=True, tokenizer_name="raw")
        schema.add_text_field("text", tokenizer_name="words", index_option="freq")
        self._schema = schema.build()
        self._index = tantivy.Index(self._schema)
        self._index.register_tokenizer("words", self._words)
        # A reader that follows commits by itself takes the lock that `reload` then waits 100 ms for.
        self._index.config_reader("manual")
        self._writer = self._index.writer(HEAP, num_threads=1)
        self._held: dict[str, Passage] = {}
        self._counts_gone = False  # whether idf counts passages that are gone

    def __len__(self) -> int:
        return len(self._held)

    def passages(self) -> Iterable[Passage]:
        """All passages, in the order they came in."""
        return self._held.values()

    def _known(self, ids: Sequence[str]) -> set[str]:
        return {i for i in ids if i in self._held}

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return [self._held[i] for i in ids]

    def _put(self, passages: Sequence[Passage], vectors: None) -> None:
        make = _tantivy().Document
        documents = [make(id=p.id, text=embedding_text(p)) for p in passages]
        with self._written():
            for passage, document in zip(passages, documents, strict=True):
                if passage.id in self._held:
                    self._writer.delete_documents_by_term("id", passage.id)
                    self._counts_gone = True
                self._writer.add_document(document)
        self._held |= {p.id: p for p in passages}

    def _delete(self, ids: Sequence[str]) -> None:
        with self._written():
            for identifier in ids:
                self._writer.delete_documents_by_term("id", identifier)
        self._counts_gone = True
        for identifier in ids:
            del self._held[identifier]

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
            self._writer.commit()
        except BaseException:
            self._writer.rollback()
            raise
        self._index.reload()

    def _search(self, questions: Sequence[str], vectors, k: int) -> list[list[Found]]:
        tantivy, searcher, found = _tantivy(), self._index.searcher(), []
        for question in questions:
            words = [*dict.fromkeys(self._words.analyze(question))][:MOST_WORDS]
            # Of words, and no query language: what a user types means nothing but itself.
            query = tantivy.Query.boolean_query(
                [
                    (
                        tantivy.Occur.Should,
                        tantivy.Query.term_query(self._schema, "text", w, "freq"),
                    )
                    for w in words
                ]
            )
            hits = searcher.search(query, min(k, len(self)), count=False).hits
            names = [searcher.doc(address).get_first("id") for _, address in hits]
            found.append(
                [Found(self._held[n], score) for n, (score, _) in zip(names, hits, strict=True)]
            )
        return found

    # --- on disk -------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {"language": self.language}

    def _save(self, folder: pathlib.Path) -> None:
        passages = [*self._held.values()]
        write_lines(folder / LINES, passages)
        if self._counts_gone:  # count as it will be counted where it is opened
            fresh = WordStore(self.language)
            fresh.add(passages)
            with self._lock:
                self._index, self._writer = fresh._index, fresh._writer
                self._counts_gone = False

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        store, passages = cls(**settings), read_lines(folder / LINES)
        if None in passages:
            raise CheckpointError(f"{folder / LINES}: a line without a passage; save it again")
        store.add(passages)
        return store


def _tantivy():
    try:
        import tantivy
    except ImportError as error:
        raise ConfigError("BM25 needs tantivy: pip install 'fedrag-jax[bm25]'") from error
    return tantivy
