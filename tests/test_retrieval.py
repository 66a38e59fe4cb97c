"""Embedding against one text at a time; the store against a sorted matrix product."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedrag_jax.clock import Spent
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.retrieval import embedding
from fedrag_jax.retrieval.embedding import embed_corpus, embed_texts
from fedrag_jax.retrieval.index import device_index
from fedrag_jax.retrieval.index.device_index import DeviceIndex
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.vector_file import VectorFile

WORDS = [f"w{i}" for i in range(50)]
DIMENSION = 8


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")


@dataclasses.dataclass(frozen=True)
class OrderedBag:
    """The smallest encoder that minds every token, its position and nothing outside the mask."""

    config: str = "ordered bag"
    traced: ClassVar[list] = []

    def __call__(self, params, tokens, mask):
        self.traced.append(tokens.shape)
        weights = mask / (1.0 + jnp.arange(tokens.shape[1]))[None]
        pooled = jnp.einsum("btd,bt->bd", params["embedding"][tokens], weights)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


_serial = itertools.count()


@pytest.fixture
def encoder():
    OrderedBag.traced.clear()
    return OrderedBag(f"ordered bag {next(_serial)}")  # unequal to earlier ones: compiled anew


@pytest.fixture(scope="module")
def params():
    return {"embedding": jax.random.normal(jax.random.key(0), (len(WORDS) + 3, DIMENSION))}


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, n)) for n in lengths]


def one_by_one(params, tokenizer, texts, max_length):
    table = np.asarray(params["embedding"], np.float64)
    vectors = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_length]
        pooled = sum(table[token] / (1 + i) for i, token in enumerate(ids))
        vectors.append(pooled / np.linalg.norm(pooled))
    return np.array(vectors)


@pytest.mark.parametrize("batch_tokens", [1, 64, 1000])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_vectors_are_those_of_each_text_alone(encoder, params, tokenizer, count, batch_tokens):
    texts = texts_of(np.random.default_rng(1).integers(0, 60, count))
    vectors = embed_texts(
        encoder, params, tokenizer, texts, max_length=40, batch_tokens=batch_tokens
    )
    assert vectors.dtype == np.float32 and vectors.shape == (count, DIMENSION)
    np.testing.assert_allclose(vectors, one_by_one(params, tokenizer, texts, 40), atol=1e-6)


def test_texts_are_tokenised_in_pieces(encoder, params, tokenizer, monkeypatch):
    monkeypatch.setattr("fedrag_jax.retrieval.embedding._TOKENIZE_AT_ONCE", 4)
    texts = texts_of(range(10))
    vectors = embed_texts(encoder, params, tokenizer, texts, max_length=20)
    np.testing.assert_allclose(vectors, one_by_one(params, tokenizer, texts, 20), atol=1e-6)


def test_compiles_once_per_width(encoder, params, tokenizer):
    texts = texts_of(np.random.default_rng(0).integers(1, 100, 500))
    embed_texts(encoder, params, tokenizer, texts, max_length=70, batch_tokens=256)
    widths = [width for _, width in encoder.traced]
    assert sorted(widths) == [16, 32, 48, 64, 70]
    assert all(rows * width <= 256 for rows, width in encoder.traced)
    other = jax.tree.map(lambda leaf: leaf + 1, params)  # parameters move in training
    embed_texts(encoder, other, tokenizer, texts[::-1], max_length=70, batch_tokens=256)
    assert len(encoder.traced) == 5


def test_a_few_questions_are_not_padded_to_a_full_batch(encoder, params, tokenizer):
    embed_texts(encoder, params, tokenizer, texts_of([3, 4, 5]), max_length=70, batch_tokens=4096)
    assert encoder.traced == [(4, 16)]


def test_progress_goes_to_stderr_when_asked(encoder, params, tokenizer, capsys):
    texts = texts_of([3] * 9)
    embed_texts(encoder, params, tokenizer, texts, max_length=16)
    assert capsys.readouterr() == ("", "")
    embed_texts(encoder, params, tokenizer, texts, max_length=16, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "9/9" in err and "texts/s" in err


def test_embedding_refuses_what_cannot_be_embedded(encoder, params, tokenizer):
    with pytest.raises(DataError, match="no texts"):
        embed_texts(encoder, params, tokenizer, [], max_length=8)
    with pytest.raises(ConfigError, match="got 0 and"):
        embed_texts(encoder, params, tokenizer, ["w1"], max_length=0)
    with pytest.raises(ConfigError, match="got 8 and 0"):
        embed_texts(encoder, params, tokenizer, ["w1"], max_length=8, batch_tokens=0)


def test_a_corpus_is_embedded_once(encoder, params, tokenizer, tmp_path, monkeypatch):
    texts = texts_of(range(1, 12))
    first = embed_corpus(encoder, params, tokenizer, texts, max_length=16, cache_dir=tmp_path)
    np.testing.assert_array_equal(
        first, embed_texts(encoder, params, tokenizer, texts, max_length=16)
    )
    (folder,) = tmp_path.iterdir()
    marked = np.full_like(first, 7)  # shows whether vectors are read or made
    VectorFile(folder, len(texts), embedding.SHARD).write(0, marked, 1234.5)
    spent = Spent()
    how = {"max_length": 16, "cache_dir": tmp_path, "spent": spent}
    again = embed_corpus(encoder, params, tokenizer, texts, **how)
    np.testing.assert_array_equal(again, marked)
    assert spent == Spent(embedding=1234.5)  # what it took then
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path))
    np.testing.assert_array_equal(
        embed_corpus(encoder, params, tokenizer, texts, max_length=16), marked
    )
    assert list(tmp_path.iterdir()) == [folder]


def test_using_a_tokenizer_does_not_change_the_cache_file(encoder, params, tokenizer, tmp_path):
    for max_length in (5, 9):  # what a call sets stays set in the tokenizer
        tokenizer("w1", truncation=True, padding="max_length", max_length=max_length)
        embed_corpus(encoder, params, tokenizer, ["w1 w2"], max_length=8, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_anything_that_changes_vectors_changes_the_cache_file(params, tokenizer, tmp_path):
    texts = ["w1 w2", "w3"]
    other_params = {"embedding": params["embedding"].at[3, 0].add(1e-6)}
    renamed = {"other": params["embedding"], "embedding": params["embedding"]}
    other_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(
            tokenizer.backend_tokenizer.to_str().replace('"w1"', '"v1"')
        ),
        pad_token="[PAD]",
    )
    runs = [
        (OrderedBag(), params, tokenizer, texts, 16),
        (OrderedBag("another config"), params, tokenizer, texts, 16),
        (OrderedBag(), other_params, tokenizer, texts, 16),
        (OrderedBag(), renamed, tokenizer, texts, 16),
        (OrderedBag(), params, other_tokenizer, texts, 16),
        (OrderedBag(), params, tokenizer, texts[::-1], 16),
        (OrderedBag(), params, tokenizer, ["w1 w2w", "3"], 16),
        (OrderedBag(), params, tokenizer, texts, 2),
    ]
    for *arguments, max_length in runs:
        embed_corpus(*arguments, max_length=max_length, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(runs)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_cache_is_made_again(encoder, params, tokenizer, tmp_path, damage, capsys):
    texts = texts_of(range(1, 6))
    first = embed_corpus(encoder, params, tokenizer, texts, max_length=16, cache_dir=tmp_path)
    first = np.array(first)  # not the file that is damaged
    (folder,) = tmp_path.iterdir()
    file, marker = folder / "vectors.npy", folder / "done" / "0.json"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-40] ^= 1
    file.write_bytes({
        "cut": good[:-50], "empty": b"", "flipped": bytes(flipped), "foreign": b"not an array",
    }[damage])  # fmt: skip
    with pytest.warns(UserWarning, match=r"damaged.*embedding again"):
        again = embed_corpus(encoder, params, tokenizer, texts, max_length=16, cache_dir=tmp_path)
    np.testing.assert_array_equal(again, first)
    marker.write_text("{")
    embed_corpus(encoder, params, tokenizer, texts, max_length=16, cache_dir=tmp_path)
    assert "0.json is damaged" in capsys.readouterr().err
    assert not VectorFile(folder, len(texts), embedding.SHARD).missing()


def test_an_embedding_that_was_killed_goes_on_with_its_next_shard(
    encoder, params, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(embedding, "SHARD", 4)
    texts, how = texts_of(range(1, 12)), {"max_length": 16, "cache_dir": tmp_path}
    whole = embed_texts(encoder, params, tokenizer, texts, max_length=16)
    embedded = []

    def killed(*args, **options):
        embedded.append(args[3])
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return embed_texts(*args, **options)

    monkeypatch.setattr(embedding, "embed_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(encoder, params, tokenizer, texts, **how)
    np.testing.assert_allclose(
        embed_corpus(encoder, params, tokenizer, texts, **how), whole, atol=1e-6
    )
    assert embedded == [texts[:4], texts[4:8], texts[8:], texts[8:]]
    (folder,) = tmp_path.iterdir()
    (folder / "done" / "1.json").unlink()
    embed_corpus(encoder, params, tokenizer, texts, **how)
    assert embedded[4:] == [texts[4:8]]


def test_vectors_may_be_kept_in_half_precision(encoder, params, tokenizer, tmp_path):
    texts, how = texts_of(range(1, 40)), {"max_length": 40, "cache_dir": tmp_path}
    single = embed_corpus(encoder, params, tokenizer, texts, **how)
    half = embed_corpus(encoder, params, tokenizer, texts, dtype="float16", **how)
    assert half.dtype == np.float16 and len([*tmp_path.iterdir()]) == 2
    np.testing.assert_array_equal(half, single.astype(np.float16))
    with pytest.raises(ConfigError, match=r"kept as one of .* got 'bfloat16'"):
        embed_corpus(encoder, params, tokenizer, texts, dtype="bfloat16", **how)
    found = FaissIndex.build(None, half).search(single, 3)
    exact = FaissIndex.build(None, half.astype(np.float32)).search(single, 3)
    np.testing.assert_array_equal(found[0], exact[0])
    np.testing.assert_array_equal(found[1], exact[1])


def test_texts_that_are_known_need_not_be_read(encoder, params, tokenizer, tmp_path):
    class Known(list):
        fingerprint = "these"

        def __iter__(self):
            raise AssertionError("read")

    texts = Known(texts_of([3, 4]))
    how = {"max_length": 16, "cache_dir": tmp_path}
    first = embed_corpus(encoder, params, tokenizer, texts, **how)
    np.testing.assert_array_equal(embed_corpus(encoder, params, tokenizer, texts, **how), first)


def test_a_cache_folder_that_cannot_be_made_is_said_before_the_work(
    encoder, params, tokenizer, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="FEDRAG_CACHE"):
        embed_corpus(
            encoder, params, tokenizer, ["w1"], max_length=8, cache_dir=tmp_path / "file" / "x"
        )
    assert not encoder.traced


def test_vectors_survive_a_cache_that_cannot_be_written(
    encoder, params, tokenizer, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("fedrag_jax.retrieval.vector_file.os.replace", full)
    with pytest.warns(UserWarning, match="not kept.*no space left"):
        vectors = embed_corpus(encoder, params, tokenizer, ["w1"], max_length=8, cache_dir=tmp_path)
    assert vectors.shape == (1, DIMENSION) and not [*tmp_path.rglob("*.npy")]


# The store.


def vectors_of(count, dimension=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=[FaissIndex, DeviceIndex])
def kind(request, monkeypatch):
    """Every test of a store is of both kinds."""
    # Several blocks of passages and of queries.
    monkeypatch.setattr("fedrag_jax.retrieval.index.device_index.BLOCK", 256)
    monkeypatch.setattr("fedrag_jax.retrieval.index.device_index._QUERIES", 8)
    return request.param


@pytest.fixture
def store_of(kind):
    return lambda vectors: kind.build([f"p{i}" for i in range(len(vectors))], vectors)


@pytest.mark.parametrize("queries", [1, 30])  # FAISS changes its method at 20
@pytest.mark.parametrize("k", [1, 10, 500])
def test_search_agrees_with_a_sorted_matrix_product(store_of, queries, k):
    vectors, q = vectors_of(500), vectors_of(queries, seed=1)
    rows, scores = store_of(vectors).search(q, k)
    assert rows.dtype == np.int32 and scores.dtype == np.float32
    reference = q.astype(np.float64) @ vectors.T.astype(np.float64)
    expected = np.argsort(-reference, axis=1)[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(reference, expected, 1), atol=1e-6)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("k", [3, 25, 39, 40, 41])
def test_ties_are_ordered_by_row(store_of, queries, k):
    vectors = vectors_of(2000)
    copies = np.random.default_rng(3).choice(2000, 40, replace=False)
    vectors[copies] = vectors[copies[0]]
    rows, _ = store_of(vectors).search(np.repeat(vectors[copies[:1]], queries, 0), k)
    for row in rows:
        assert row[:40].tolist() == np.sort(copies)[:k].tolist()


def test_everything_tied(store_of):
    store = store_of(np.ones((300, 4), np.float32))
    assert store.search(np.ones((2, 4)), 5)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert store.search(np.ones((1, 4)), 300)[0].tolist() == [list(range(300))]


def test_no_queries(store_of):
    rows, scores = store_of(vectors_of(5)).search(np.empty((0, 16)), 2)
    assert rows.shape == scores.shape == (0, 2)


def test_replace_is_a_rebuild_of_the_rows_named(store_of):
    vectors, new = vectors_of(100), vectors_of(7, seed=5)
    store = store_of(vectors)
    before = store.vectors.copy()
    rows = np.array([3, 99, 0, 50, 51, 7, 8])
    store.replace(rows, new)
    expected = vectors.copy()
    expected[rows] = new
    np.testing.assert_array_equal(before, vectors)
    np.testing.assert_array_equal(store.vectors, expected)
    queries = vectors_of(30, seed=6)
    for found, wanted in zip(
        store.search(queries, 10), store_of(expected).search(queries, 10), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    assert store.search(new[:1], 1)[0].tolist() == [[3]]
    assert store.ids[3] == "p3" and len(store) == 100


def test_what_is_replaced_is_the_own_copy_of_the_store(store_of, kind, tmp_path):
    vectors = vectors_of(10)
    store = store_of(vectors)
    assert np.shares_memory(store.vectors, vectors) == (kind is FaissIndex)
    with pytest.raises(ValueError, match="read-only"):
        store.vectors[0] = 1
    store.replace([2], vectors[3:4])
    np.testing.assert_array_equal(vectors, vectors_of(10))
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    for where in (mapped, mapped[2:]):
        store = store_of(where)
        found = store.search(vectors[3:5], 2)[0]
        assert (found[:, 0] == np.array([3, 4]) - (10 - len(where))).all()
        store.replace([0], vectors[:1])
        assert store.search(vectors[:1], 1)[0].tolist() == [[0]]
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors)


def test_other_vectors_make_a_store_of_the_same_kind_and_passages(store_of, kind):
    store, vectors = store_of(vectors_of(20)), vectors_of(20, dimension=8, seed=1)
    other = store.with_vectors(vectors)
    assert type(other) is kind and other.ids == store.ids and other.dimension == 8
    np.testing.assert_array_equal(other.vectors, vectors)
    np.testing.assert_array_equal(store.vectors, vectors_of(20))


def test_one_program_searches_for_similar_numbers_of_questions():
    store = DeviceIndex.build([f"p{i}" for i in range(200)], vectors_of(200))
    device_index._nearest.clear_cache()
    for queries in (9, 12, 16, 256 + 13):
        store.search(vectors_of(queries), 5)
    assert device_index._nearest._cache_size() == 2  # 16 and 256


def test_save_and_load(store_of, kind, tmp_path):
    store = store_of(vectors_of(20))
    store.replace([4], vectors_of(1, seed=9))
    store.save(tmp_path / "new" / "store")
    loaded = kind.load(tmp_path / "new" / "store")
    assert loaded.ids == store.ids and loaded.dimension == 16
    np.testing.assert_array_equal(loaded.vectors, store.vectors)


@pytest.mark.parametrize("damage", ["ids.json gone", "vectors.npy gone", "cut", "fewer ids"])
def test_a_damaged_store_is_refused(store_of, kind, tmp_path, damage):
    store_of(vectors_of(20)).save(tmp_path)
    if damage.endswith("gone"):
        (tmp_path / damage.split()[0]).unlink()
    elif damage == "cut":
        path = tmp_path / "vectors.npy"
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (tmp_path / "ids.json").write_text('["p0"]')
    with pytest.raises(CheckpointError, match="does not hold a store"):
        kind.load(tmp_path)


def test_store_refuses_what_it_cannot_hold(kind):
    with pytest.raises(DataError, match="corpus is empty"):
        kind.build([], np.empty((0, 4)))
    with pytest.raises(DataError, match="'b' occurs twice"):
        kind.build(["a", "b", "b"], np.ones((3, 4)))
    with pytest.raises(DataError, match="2 passage ids but 3 vectors"):
        kind.build(["a", "b"], np.ones((3, 4)))
    with pytest.raises(ConfigError, match=r"got shape \(4,\)"):
        kind.build(["a"], np.ones(4))
    with pytest.raises(DataError, match="passage vector 1 has a value that is not finite"):
        kind.build(["a", "b"], [[1.0, 2.0], [1.0, np.nan]])


def test_store_refuses_what_it_cannot_search_or_replace(store_of):
    store = store_of(vectors_of(5))
    for k in (0, 6):
        with pytest.raises(ConfigError, match=f"corpus' 5 passages, got {k}"):
            store.search(vectors_of(1), k)
    with pytest.raises(ConfigError, match="dimension 16, got 8"):
        store.search(vectors_of(1, 8), 1)
    with pytest.raises(DataError, match="query vector 0"):
        store.search(np.full((1, 16), np.inf), 1)
    with pytest.raises(ConfigError, match="dimension 16, got 8"):
        store.replace([0], vectors_of(1, 8))
    with pytest.raises(ConfigError, match="between 0 and 4, got -1 to 5"):
        store.replace([-1, 5], vectors_of(2))
    with pytest.raises(ConfigError, match="2 vectors for rows"):
        store.replace([0], vectors_of(2))
    with pytest.raises(DataError, match="passage vector 0"):
        store.replace([0], np.full((1, 16), np.nan))
