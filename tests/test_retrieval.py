"""Exact indexes against a sorted matrix product."""

import numpy as np
import pytest

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.index import device_index
from fedrag_jax.retrieval.index.device_index import DeviceIndex
from fedrag_jax.retrieval.index.faiss_index import FaissIndex


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
    return kind.build


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
    assert len(store) == 100


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
    assert type(other) is kind and other.dimension == 8
    np.testing.assert_array_equal(other.vectors, vectors)
    np.testing.assert_array_equal(store.vectors, vectors_of(20))


def test_one_program_searches_for_similar_numbers_of_questions():
    store = DeviceIndex.build(vectors_of(200))
    device_index._nearest.clear_cache()
    for queries in (9, 12, 16, 256 + 13):
        store.search(vectors_of(queries), 5)
    assert device_index._nearest._cache_size() == 2  # 16 and 256


def test_store_refuses_what_it_cannot_hold(kind):
    with pytest.raises(DataError, match="corpus is empty"):
        kind.build(np.empty((0, 4)))
    with pytest.raises(ConfigError, match=r"got shape \(4,\)"):
        kind.build(np.ones(4))
    with pytest.raises(DataError, match="passage vector 1 has a value that is not finite"):
        kind.build([[1.0, 2.0], [1.0, np.nan]])


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
