"""FAISS stores: what is near is found, changes cost no quality, and hostile files are refused."""

import faiss
import numpy as np
import pytest
from stored import FAISS, PASSAGES, VECTORS, D, ask, ids, unit

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.retrieval.stores import passage_lines
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.registry import open_store


@pytest.mark.parametrize("index", ["ivf", "hnsw", "pq"])
def test_approximate_indexes_find_most_of_what_is_near(index):
    size = 12_000
    # Near copies: what a search is for.
    vectors, questions = unit(size), None
    questions = vectors[:200] + 0.3 * unit(200, seed=3)
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    store = FaissStore(D, index, probes=8)
    store.add([Passage(str(i), "", "") for i in range(size)], vectors)
    assert type(store._held.index).__name__ == {
        "ivf": "IndexIVFFlat", "hnsw": "IndexHNSWFlat", "pq": "IndexIVFPQ"
    }[index]  # fmt: skip
    nearest = np.argmax(questions @ vectors.T, axis=1)
    found = ids(store.search([""] * 200, questions, k=10))
    hit = np.mean([str(row) in some for row, some in zip(nearest, found, strict=True)])
    assert hit > 0.85
    store.delete([str(row) for row in nearest])
    found = ids(store.search([""] * 200, questions, k=10))
    assert not {i for some in found for i in some} & {str(row) for row in nearest}
    assert all(len(some) == 10 for some in found)


def test_rows_of_what_is_gone_are_given_back():
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    for i in range(10):
        store.replace(PASSAGES, unit(200, seed=i))
    assert len(store._held.passages) <= 1000
    assert ids(ask(store, range(200), k=1, vectors=unit(200, seed=9))) == [[p.id] for p in PASSAGES]


def test_a_trained_index_keeps_its_quality_under_changes(tmp_path):
    size = 12_000
    vectors, passages = unit(size), [Passage(str(i), "", "") for i in range(size)]
    store = FaissStore(D, "pq", probes=1000)
    store.add(passages, vectors)

    def error():
        held = {p.id: v for p, v in zip(store._held.alive(), store._held.vectors(), strict=True)}
        return np.mean([((held[str(i)] - vectors[i]) ** 2).sum() for i in range(100)])

    before = error()
    for _ in range(3):
        store.delete([str(i) for i in range(5000, size)])
        store.add(passages[5000:], vectors[5000:])
    assert error() < 1.1 * before  # some have moved to the next list, nothing is trained anew
    store.save(tmp_path)
    for memory_map in (False, True):
        assert ask(open_store(tmp_path, memory_map), range(20), vectors=vectors) == ask(
            store, range(20), vectors=vectors
        )


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw", "pq"])
def test_an_index_of_another_kind_is_refused(tmp_path, index):
    store = FaissStore(D, index, lists=4)
    store.add(PASSAGES, VECTORS)
    store.save(tmp_path)
    distances = faiss.IndexFlatL2(D)
    victim = tmp_path / "victim.bin"
    elsewhere = faiss.IndexIVFFlat(faiss.IndexFlatIP(D), D, 4, faiss.METRIC_INNER_PRODUCT)
    elsewhere.train(VECTORS)
    lists = faiss.OnDiskInvertedLists(4, D * 4, str(victim))
    elsewhere.replace_invlists(lists, False)
    for hostile in (distances, elsewhere):
        hostile.add(VECTORS)
        faiss.write_index(hostile, str(tmp_path / "store-data-1" / "index.faiss"))
        before = victim.read_bytes() if victim.exists() else b""
        with pytest.raises(
            CheckpointError, match=r"index.faiss is not an index of kind|holds no store"
        ):
            open_store(tmp_path)
        assert (victim.read_bytes() if victim.exists() else b"") == before


def test_a_memory_mapped_store_answers_and_refuses_to_change(tmp_path):
    for index in ("flat", "ivf", "hnsw"):
        store = FAISS[index]()
        store.add(PASSAGES, VECTORS)
        store.delete(["p004"])
        store.save(tmp_path / index)
        mapped = open_store(tmp_path / index, memory_map=True)
        assert ask(mapped, range(40)) == ask(store, range(40)) and len(mapped) == 199
        for change in (
            lambda s=mapped: s.add([Passage("new", "", "")], unit(1)),
            lambda s=mapped: s.delete(["p001"]),
            lambda s=mapped: s.replace(PASSAGES[:1], unit(1)),
            lambda s=mapped: s.refresh(lambda passages: VECTORS[: len(passages)]),
        ):
            with pytest.raises(ConfigError, match="memory-mapped and cannot be changed"):
                change()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"index": "tree"}, "index must be one of .*'tree'"),
        ({"dimension": 0}, "dimension >= 1"),
        ({"neighbours": 1}, "neighbours >= 2"),
        ({"codes": 5}, "codes must divide the dimension 16, got 5"),
    ],
)
def test_indexes_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        FaissStore(**({"dimension": D} | settings))


def test_a_memory_mapped_store_is_opened_without_reading_its_passages(tmp_path, monkeypatch):
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    store.delete([p.id for p in PASSAGES[5:9]])
    store.save(tmp_path)
    read = []
    own = passage_lines._passage
    monkeypatch.setattr(passage_lines, "_passage", lambda *line: read.append(1) or own(*line))
    mapped = open_store(tmp_path, memory_map=True)
    assert len(mapped) == 196 and not read
    found = ids(ask(mapped, range(20), k=3))
    assert found == ids(ask(store, range(20), k=3)) and len(read) <= 20 * 4
    assert mapped.get(["p003"]) == [PASSAGES[3]]
    with pytest.raises(DataError, match="'p006' is not in the store"):
        mapped.get(["p006"])
