"""Stores that search words: BM25 by its formula, one form of each word, and ranks that are fused."""

import re
import unicodedata

import numpy as np
import pytest
from stored import ids

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore


def test_bm25_is_the_formula():
    texts = ["red fish, blue fish", "one fish", "The RED Cat sat: red!", "nothing of the kind"]
    store = BM25Store()
    store.add([Passage(str(i), "", text) for i, text in enumerate(texts)])
    split = [[w for w in re.split(r"\W+", text.lower()) if w] for text in texts]
    mean, scores = np.mean([len(words) for words in split]), np.zeros(4)
    for word in ("red", "fish"):
        there = sum(word in words for words in split)
        idf = np.log(1 + (4 - there + 0.5) / (there + 0.5))
        for i, words in enumerate(split):
            tf = words.count(word)
            scores[i] += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(words) / mean))
    (found,) = store.search(["Red fish?"], k=4)
    assert [f.passage.id for f in found] == [str(i) for i in np.argsort(-scores)[:3]]
    np.testing.assert_allclose([f.score for f in found], np.sort(scores)[::-1][:3], rtol=1e-5)


def test_words_are_words_and_no_query_language():
    store = BM25Store("english")
    store.add(
        [Passage("a", "Running", "of dogs"), Passage("b", "", 'AND NOT "x" text:(+y) [z TO *]')]
    )
    assert ids(store.search(["run", "dog!", 'NOT "dogs"', "text:(", "* \x00 ~2", ""], k=2)) == [
        ["a"], ["a"], ["a", "b"], ["b"], [], []
    ]  # fmt: skip
    assert ids(store.search([" ".join(f"w{i}" for i in range(1_000_000)), "of " * 1_000_000])) == [
        [], ["a"]
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"language must be one of .*'klingon'"):
        BM25Store("klingon")


def test_words_have_one_form_in_passages_and_questions(recwarn):
    forms = {
        "accent": ("Zémour", unicodedata.normalize("NFD", "Zémour")),
        "width": ("Kronos", "Ｋｒｏｎｏｓ"),
        "hyphen": ("Broktan", "Brok\u00adtan"),
        "space": ("Mirvale", "Mir\u200bvale"),
        "ligature": ("firefly", "ﬁreﬂy"),
        "mark": ("Quo", "\ufeffQuo\ufe0f"),
        "persian": ("می روم", "می\u200cروم"),
        "khmer": ("ភាសា ខ្មែរ", "ភាសា\u200bខ្មែរ"),
    }
    for passage, question in ((0, 1), (1, 0)):
        store = BM25Store()
        store.add([Passage(name, "", f"see {form[passage]}.") for name, form in forms.items()])
        asked = store.search([form[question] for form in forms.values()], k=9)
        assert ids(asked) == [[name] for name in forms]
        assert store.get(["ligature"])[0].text == f"see {forms['ligature'][passage]}."
    assert not recwarn.list  # Khmer with marks between its words is split


def test_passages_that_are_not_split_into_words_are_told(recwarn):
    store = BM25Store()
    store.add([Passage("en", "", "Beijing (北京) is a city."), Passage("ko", "", "서울은 도시다")])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"2 of 3 passages, 'ja' first, .* whole runs of letters"):
        store.add(
            [
                Passage("ja", "", "東京は日本の首都です。"),
                Passage("th", "", "กรุงเทพเป็นเมืองหลวง"),
                Passage("de", "", "Größe"),
            ]
        )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tantivy", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedrag-jax\[bm25\]'"):
        BM25Store()


def test_ranks_are_fused():
    store = HybridStore([FaissStore(2), BM25Store()])
    texts = ["apple", "apple pie and more", "pear"]
    vectors = np.array([[0, 1], [1, 0], [0.6, 0.8]], np.float32)
    store.add([Passage(str(i), "", text) for i, text in enumerate(texts)], vectors)
    # By vector 1, 2, 0; by words 0, 1.
    (found,) = store.search(["apple"], vectors[1:2], k=3)
    assert [f.passage.id for f in found] == ["1", "0", "2"]
    np.testing.assert_allclose(
        [f.score for f in found], [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62], rtol=1e-12
    )


def test_a_hybrid_asks_each_store_once_what_it_holds_of_deleted_passages(monkeypatch):
    store, asked = HybridStore([FaissStore(2), BM25Store()]), []
    store.add(
        [Passage(str(i), "", f"text {i}") for i in range(5)],
        np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0]],
    )
    for part in store.parts:
        known = part._known
        monkeypatch.setattr(
            part, "_known", lambda ids, known=known: asked.append(ids) or known(ids)
        )
    store.parts[1]._delete(["2"])  # as after a deletion that failed in part
    store.delete(["1", "2", "3"])
    assert asked == 3 * [["1", "2", "3"]]  # the hybrid asks its first store, too
    assert [p.id for part in store.parts for p in part.passages()] == ["0", "4"] * 2


@pytest.mark.parametrize(("depth", "first"), [(1, "both"), (3, "word")])
def test_what_a_hybrid_finds_first_depends_on_how_deep_it_looks(depth, first):
    """A store is asked for one more than is wanted; both are second for `both`."""
    store = HybridStore([FaissStore(2), BM25Store()], depth)
    texts = {"near": "pear", "word": "apple", "both": "apple pie and more"}
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
    store.add([Passage(name, "", text) for name, text in texts.items()], vectors)
    assert (
        1 / 61 < 1 / 62 + 1 / 62 < 1 / 61 + 1 / 63
    )  # `word` alone is found by its vector as third
    assert ids(store.search(["apple"], vectors[:1], k=1)) == [[first]]


def test_a_hybrid_of_stores_that_do_not_fit_is_refused():
    one, other = BM25Store(), BM25Store()
    one.add([Passage("a", "", "a")])
    for parts, words in (
        ([one], "two stores or more"),
        ([one, other], r"hold the same passages, these hold \[1, 0\]"),
        ([FaissStore(2), FaissStore(3)], r"dimensions \[2, 3\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            HybridStore(parts)
