"""Embedding against one text at a time, and what is kept of it on disk."""

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
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval import embedding
from fedrag_jax.retrieval.embedding import embed_corpus, embed_texts
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
    VectorFile(folder, len(texts), embedding.SHARD["cpu"]).write(0, marked, 1234.5)
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
    assert not VectorFile(folder, len(texts), embedding.SHARD["cpu"]).missing()


def test_one_bar_tells_of_all_shards(encoder, params, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(embedding.SHARD, "cpu", 4)
    how = {"max_length": 16, "cache_dir": tmp_path, "progress": True}
    embed_corpus(encoder, params, tokenizer, texts_of(range(1, 12)), **how)
    assert "11/11" in capsys.readouterr().err
    embed_corpus(encoder, params, tokenizer, texts_of(range(1, 12)), **how)
    assert not capsys.readouterr().err, "nothing is left to do"


def test_an_embedding_that_was_killed_goes_on_with_its_next_shard(
    encoder, params, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setitem(embedding.SHARD, "cpu", 4)
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
    found = FaissIndex.build(half).search(single, 3)
    exact = FaissIndex.build(half.astype(np.float32)).search(single, 3)
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


@pytest.mark.parametrize("step", ["retrieval.vector_file.os.replace", "files.os.fsync"])
def test_vectors_survive_a_cache_that_cannot_be_written(
    encoder, params, tokenizer, tmp_path, monkeypatch, step
):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(f"fedrag_jax.{step}", full)
    with pytest.warns(UserWarning, match="vectors are not cached.*no space left"):
        vectors = embed_corpus(encoder, params, tokenizer, ["w1"], max_length=8, cache_dir=tmp_path)
    assert vectors.shape == (1, DIMENSION) and not [*tmp_path.rglob("*.json")]
