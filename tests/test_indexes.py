"""Kinds of index by name: what the approximate ones find, keep and refuse, and shares of devices."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import stored

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.fit import fit
from fedrag_jax.models import hub
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.approximate_index import ApproximateIndex
from fedrag_jax.retrieval.index.by_name import INDEXES, index_kind
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.faiss_kinds import FaissKind
from fedrag_jax.retrieval.index.recall import index_recall
from fedrag_jax.retrieval.index.store_index import StoreIndex
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.faiss_store import FaissStore

APPROXIMATE = ("ivf", "pq", "hnsw")
SIZE, D = 12_000, 16
TRAINED = FaissKind.trained


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    return unit(SIZE)


@pytest.fixture(scope="module")
def built(vectors):
    """An index of each kind, which no test changes."""
    options = {"ivf": {"probes": 20}, "pq": {"probes": 20, "codes": 8}}
    return {n: index_kind(n, options.get(n, {}))(vectors) for n in ("flat", *APPROXIMATE)}


def near(vectors, count=100):
    """Questions near to passages, of which they are to be told the nearest."""
    noisy = vectors[:count] + 0.3 * unit(count, seed=3)
    return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_indexes_find_most_of_what_exact_ones_find(name, built, vectors):
    questions = near(vectors)
    exact, scores = built["flat"].search(questions, 10)
    found, about = built[name].search(questions, 10)
    assert found.dtype == np.int32 and found.shape == (100, 10) and (found >= 0).all()
    assert np.mean(found[:, 0] == exact[:, 0]) > 0.85
    assert (np.diff(about, axis=1) <= 0).all()
    if name != "pq":  # whose scores are of codes
        both = found[:, 0] == exact[:, 0]
        np.testing.assert_allclose(about[both, 0], scores[both, 0], atol=1e-5)
    assert built["flat"].exact and not built[name].exact


@pytest.mark.parametrize("name", APPROXIMATE)
def test_replaced_vectors_are_found_where_they_are_now(name, vectors):
    mine = np.array(vectors)
    index = index_kind(name)(mine)
    rows = np.array([7, 9_000, 3, 7])
    fresh = unit(4, seed=9)
    index.replace(rows, fresh)
    np.testing.assert_array_equal(mine, vectors)
    expected = np.array(vectors)
    expected[rows] = fresh
    np.testing.assert_array_equal(index.vectors, expected)
    assert index.search(fresh[1:], 1)[0].ravel().tolist() == [9_000, 3, 7]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_few_other_vectors_need_no_new_training(name, built, vectors, monkeypatch):
    few = np.array(vectors)
    few[[5, 11_000]] = unit(2, seed=9)
    trained = []
    monkeypatch.setattr(
        FaissKind, "trained", lambda kind, *how: trained.append(1) or TRAINED(kind, *how)
    )
    other = built[name].with_vectors(few)
    assert other.search(unit(2, seed=9), 1)[0].ravel().tolist() == [5, 11_000]
    assert len(trained) == (name == "hnsw")
    # The index it was made of is as it was.
    assert built[name].search(vectors[5:6], 1)[0].tolist() == [[5]]
    assert built[name].with_vectors(np.array(vectors)).search(vectors[5:6], 1)[0] == 5
    many = unit(SIZE, seed=6)
    assert built[name].with_vectors(many).search(many[:3], 1)[0].ravel().tolist() == [0, 1, 2]
    assert len(trained) == 1 + (name == "hnsw")


@pytest.mark.parametrize("name", APPROXIMATE)
def test_other_vectors_make_an_index_of_the_same_kind(name, built):
    other = built[name].with_vectors(unit(500, seed=4))
    assert type(other) is ApproximateIndex and other.kind == built[name].kind
    assert len(other) == 500


def test_lists_that_hold_too_little_do_not_leave_places_empty(vectors):
    index = index_kind("ivf", {"lists": 100, "probes": 1})(vectors)
    found, scores = index.search(vectors[:3], 2000)
    assert all(len({*row}) == 2000 and min(row) >= 0 for row in found.tolist())
    assert np.isfinite(scores).all() and (found[:, 0] == [0, 1, 2]).all()


def test_a_graph_of_many_equal_vectors_leaves_no_places_empty():
    vectors = unit(3000)
    vectors[:2000] = vectors[0]
    index, questions = index_kind("hnsw")(vectors), unit(20, seed=1)
    found, scores = index.search(questions, 1000)
    assert all(len({*row}) == 1000 and min(row) >= 0 for row in found.tolist())
    np.testing.assert_allclose(
        np.take_along_axis(questions @ vectors.T, found, 1), scores, atol=1e-5
    )


def test_few_vectors_are_searched_exactly():
    vectors = unit(200)
    exact = FaissIndex.build(vectors).search(unit(9, seed=1), 5)
    for name in ("ivf", "pq"):
        found = index_kind(name)(vectors).search(unit(9, seed=1), 5)
        np.testing.assert_array_equal(found[0], exact[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {}, r"index: unknown kind of index 'kd'; choose among \['flat', 'device', 'ivf'"),
        ("flat", {"lists": 3}, r"unknown options \['lists'\] of index 'flat'; choose among \[\]"),
        ("hnsw", {"probes": 3}, r"unknown options .* choose among \['neighbours', 'effort'\]"),
        ("qdrant", {}, r"index: index 'qdrant' needs the option 'at', its location"),
        ("ivf", {"lists": -1}, r"index: an index needs lists, probes and codes >= 0"),
    ],
)
def test_what_is_no_index_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        index_kind(name, options)


def test_codes_must_divide_the_dimension(vectors):
    with pytest.raises(ConfigError, match="codes must divide the dimension 16, got 5"):
        index_kind("pq", {"codes": 5})(vectors)


@pytest.fixture(scope="module")
def retriever():
    passages = synthetic.generate(synthetic.WorldConfig(people=20)).passages[:60]
    return Retriever.build(hub.load("builtin:encoder"), passages)


def options_of(name):
    if name == "postgres":
        return {"at": stored.postgres(), "collection": "of an index"}
    return {"at": ":memory:"} if name == "qdrant" else {}


@pytest.mark.parametrize("name", ["qdrant", "postgres"])
def test_a_store_elsewhere_is_searched_as_an_index(name):
    vectors, asked = unit(300), unit(20, seed=1)
    vectors[40] = vectors[7]
    index = index_kind(name, options_of(name) | {"collection": "mine"})(vectors)
    exact = FaissIndex.build(vectors)

    def assert_same(queries):
        (found, about), (rows, scores) = index.search(queries, 5), exact.search(queries, 5)
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_allclose(about, scores, atol=1e-6)

    assert_same(asked)
    assert index.search(vectors[7:8], 2)[0].tolist() == [[7, 40]]
    for each in (index, exact):
        each.replace(np.array([3, 299, 3]), unit(3, seed=5))
    np.testing.assert_array_equal(index.vectors, exact.vectors)
    assert_same(unit(3, seed=5))
    other = index.with_vectors(unit(300, seed=8))
    assert other.store is index.store and len(other.store) == 300
    assert other.search(unit(300, seed=8)[9:10], 1)[0].tolist() == [[9]]
    with pytest.raises(ConfigError, match="holds 300 passages, which are not these 10"):
        index.with_vectors(unit(10))
    # Both search their own vectors, in turn; a replacement in one is none in the other.
    assert_same(asked)
    other.replace(np.array([9]), -unit(300, seed=8)[9:10])
    assert_same(asked)
    assert other.search(-unit(300, seed=8)[9:10], 1)[0].tolist() == [[9]]


def test_a_store_is_filled_again_by_the_same_corpus_alone():
    store, vectors = FaissStore(D), unit(50)
    first = StoreIndex.build(vectors, store=store)
    tuned = first.with_vectors(unit(50, seed=1))
    again = StoreIndex.build(vectors, store=store)  # as a run that is resumed
    assert tuned.search(unit(1, seed=1), 1)[0].tolist() == [[0]]
    assert again.search(vectors[3:4], 1)[0].tolist() == [[3]]
    with pytest.raises(ConfigError, match="faiss store holds 50 passages, which are not these 50"):
        StoreIndex.build(unit(50, seed=2), store=store)
    assert again.search(vectors[3:4], 1)[0].tolist() == [[3]]
    served = FaissStore(stored.D)
    served.add(stored.PASSAGES, stored.VECTORS)
    with pytest.raises(ConfigError, match="holds 200 passages"):
        StoreIndex.build(stored.VECTORS, store=served)
    assert served.get(["p003"]) == [stored.PASSAGES[3]]


@pytest.mark.parametrize("name", INDEXES)
def test_a_retriever_searches_by_any_kind(name, retriever):
    other = retriever.searched_by(index_kind(name, options_of(name)))
    asked = ["Who?", "Where?"]
    np.testing.assert_array_equal(other.search(asked, 3)[0], retriever.search(asked, 3)[0])
    assert type(other.with_vectors(retriever.bare_vectors).index) is type(other.index)


def test_a_system_is_built_over_any_kind_and_half_precision(retriever):
    system = RAGSystem.build(retriever.passages, index="hnsw", vectors="float16", top_k=3)
    assert type(system.retriever.index) is ApproximateIndex
    assert system.retriever.vectors.dtype == np.float16
    asked = ["Who?", "Where?", "When?"]
    assert index_recall(system.retriever, asked, 3).tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"index: unknown kind of index 'kd'"):
        RAGSystem.build(retriever.passages, index="kd")
    with pytest.raises(ConfigError, match=r"kept as one of .* got 'int8'"):
        RAGSystem.build(retriever.passages, vectors="int8")


def test_recall_counts_what_an_index_misses(retriever):
    class Half(FaissIndex):
        def _search(self, queries, k):
            rows, scores = super()._search(queries, k)
            rows[:, k // 2 :] = len(self) - 1 - np.arange(k - k // 2)
            return rows, scores

    far = retriever.searched_by(Half.build)
    recall = index_recall(far, ["Who wrote it?"], 4)
    assert 0.5 <= recall[0] < 1


SHARES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from fedrag_jax.retrieval.index import device_index
from fedrag_jax.retrieval.index.device_index import DeviceIndex
device_index.BLOCK = 256
rng = np.random.default_rng(0)
for size in (3, 130, 1500, 5000):
    vectors = rng.normal(size=(size, 16)).astype(np.float32)
    vectors[size // 2] = vectors[1]  # a tie over two devices
    queries = np.concatenate([rng.normal(size=(20, 16)), vectors[1:2]]).astype(np.float32)
    one = DeviceIndex.build(vectors)
    four = DeviceIndex.build(vectors, devices=jax.devices())
    assert len({s.device for s in four._blocks.addressable_shards}) == 4
    for k in (1, 3, min(size, 300)):
        for a, b in zip(one.search(queries, k), four.search(queries, k)):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(four.vectors, vectors)
    fresh = rng.normal(size=(2, 16)).astype(np.float32)
    for index in (one, four):
        index.replace([0, size - 1], fresh)
    assert four.search(fresh, 1)[0].tolist() == one.search(fresh, 1)[0].tolist()
    assert len(four.with_vectors(vectors)._devices) == 4

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import embedding_text
from fedrag_jax.federated.fit import fit
from fedrag_jax.models import hub
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.embedding import embed_texts
model = hub.load("builtin:encoder")
texts = [embedding_text(p) for p in synthetic.generate(synthetic.WorldConfig(people=20)).passages[:40]]
how = {"max_length": 32, "batch_tokens": 256}
one = embed_texts(model.network, model.params, model.tokenizer, texts, **how)
four = embed_texts(
    model.network, model.params, model.tokenizer, texts, devices=jax.devices(), **how
)
np.testing.assert_allclose(one, four, atol=1e-6)
"""


def test_devices_hold_a_share_each():
    subprocess.run(
        [sys.executable, "-c", SHARES], check=True, cwd=pathlib.Path(__file__).parent.parent
    )


def test_half_precision_trains_a_query_encoder(retriever):
    passages = retriever.passages
    examples = [
        Example(f"q{i}", f"Who or what is {p.title}?", (p.title,), (p.id,))
        for i, p in enumerate(passages)
    ]
    dataset, found = Dataset("titles", passages, examples, [], []), {}
    for dtype in ("float32", "float16"):
        kept = Retriever.build(hub.load("builtin:encoder"), passages, dtype=dtype)
        task = multiple_negatives_ranking(kept, dataset)
        result = fit(task, examples, rounds=4, batch_size=16)
        found[dtype] = [record["loss"] for record in result.history]
    np.testing.assert_allclose(found["float16"], found["float32"], rtol=5e-3)
    assert found["float16"][-1] < found["float16"][0]
