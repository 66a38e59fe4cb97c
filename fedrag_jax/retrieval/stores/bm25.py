"""Word search with BM25.

pip install 'fedrag-jax[bm25]'
"""

import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from tokenizers import Regex, normalizers

from fedrag_jax.data.answers import UNSPACED
from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import CheckpointError, ConfigError, missing
from fedrag_jax.retrieval.stores.knowledge_store import Found, KnowledgeStore
from fedrag_jax.retrieval.stores.passage_lines import LINES, read_lines, write_lines

STEMMED = ("arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek",
           "hungarian", "italian", "norwegian", "portuguese", "romanian", "russian", "spanish",
           "swedish", "tamil", "turkish")  # fmt: skip
MOST_WORDS = 1024  # different ones of a question that are looked for: a page of them, and no book
HEAP = (
    15_000_000  # bytes that are filled before a part of the index is made; the fewest there may be
)
LONGEST_WORDS = 6  # letters of their words, on average
# Characters that show nothing stand inside of words, but for two that writers put between them: the
# zero-width space where there are no other spaces, and the non-joiner of Arabic script.
PARTING = re.compile(rf"(?<=[{UNSPACED}])\u200b|(?<=[\u0600-\u06ff])\u200c")
ONE_FORM = normalizers.Sequence(
    [normalizers.Replace(Regex(r"\p{Default_Ignorable_Code_Point}"), ""), normalizers.NFKC()]
)


class BM25Store(KnowledgeStore):
    """An inverted index of titles and texts in memory, using the library tantivy.

        score = sum over words w of the question: idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avg))

    with k1 = 1.2 and b = 0.75 (Robertson and Zaragoza 2009). Words are runs of letters and digits, in
    lower case and normalised by `one_form`. Text in a script without spaces is not split into words; a
    warning reports such passages. Deleted passages count in idf until the store is saved.
    """

    kind, cosines = "bm25", False

    def __init__(self, language: str = ""):
        """Creates an empty store.

        Args:
          language: language of the stemmer, such as "english"; default: no stemming.

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
        """All passages, in the order in which they were added."""
        return self._held.values()

    def _known(self, ids: Sequence[str]) -> set[str]:
        return {i for i in ids if i in self._held}

    def _get(self, ids: Sequence[str]) -> list[Passage]:
        return [self._held[i] for i in ids]

    def _put(self, passages: Sequence[Passage], vectors: None) -> None:
        make = _tantivy().Document
        texts = [one_form(embedding_text(p)) for p in passages]
        _tell_unspaced(passages, texts)
        documents = [make(id=p.id, text=t) for p, t in zip(passages, texts, strict=True)]
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
            words = [*dict.fromkeys(self._words.analyze(one_form(question)))][:MOST_WORDS]
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
            fresh = BM25Store(self.language)
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


def one_form(text: str) -> str:
    """Returns the normal form in which questions and passages are compared.

    This is Unicode's NFKC (UAX 15) without invisible characters (Default_Ignorable_Code_Point): accents
    are composed; full width, ligatures and superscripts become plain; soft hyphens are removed.
    """
    return text if text.isascii() else ONE_FORM.normalize_str(PARTING.sub(" ", text))


def _tell_unspaced(passages: Sequence[Passage], texts: Sequence[str]) -> None:
    """Warns of passages that are not split into words."""
    whole = [p.id for p, text in zip(passages, texts, strict=True) if _unsplit(text)]
    if whole:
        warnings.warn(
            f"{len(whole):,} of {len(texts):,} passages, {whole[0]!r} first, have no spaces between "
            "words, so a word index does not split them: a question finds them only by whole runs of "
            "letters. Search them by vectors, or put spaces between their words",
            stacklevel=5,
        )


def _unsplit(text: str) -> bool:
    """Returns whether most letters are in a script without spaces, in runs longer than words."""
    if text.isascii():
        return False
    runs = [len(run) for run in re.findall(f"[{UNSPACED}]+", text)]
    letters = len(re.findall(r"[^\W\d_]", text))
    return sum(runs) > max(letters / 2, LONGEST_WORDS * len(runs))


def _tantivy():
    try:
        import tantivy
    except ImportError as error:
        raise missing("BM25 needs tantivy", "bm25") from error
    return tantivy
