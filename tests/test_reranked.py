"""The store whose passages a cross-encoder puts in order, and a system over it."""

import dataclasses
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from cross_encoders import WORDS, counting, cross_encoder, edited, pair_tokenizer, some_words
from stored import D, ids, unit

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.models.cross_encoder import CrossEncoder
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.registry import open_store
from fedrag_jax.retrieval.stores.reranked import RerankedStore

PASSAGES = [Passage(f"p{i:02}", f"w{i}", some_words(5, 1000 + i)) for i in range(60)]
VECTORS = unit(60)
ASKED, NEAR = [some_words(4, i) for i in range(6)], unit(6, 9)


@pytest.fixture(scope="module")
def random():
    return cross_encoder(pair_tokenizer(WORDS))


@pytest.fixture
def plain():
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    return store


def test_the_order_is_the_cross_encoders(plain, random):
    store = RerankedStore(plain, random, depth=20)
    found = store.search(ASKED, NEAR, k=20)
    for question, some, near in zip(ASKED, found, plain.search(ASKED, NEAR, 20), strict=True):
        passages = [f.passage for f in near]
        scores = random.scores([question] * 20, [embedding_text(p) for p in passages])
        best = np.argsort(-scores)
        assert [f.passage for f in some] == [passages[i] for i in best] != passages
        np.testing.assert_allclose([f.score for f in some], scores[best], atol=1e-5)
    negated = jax.tree.map(lambda x: x, random.params)
    negated["out"] = jax.tree.map(lambda x: -x, negated["out"])
    against = RerankedStore(plain, dataclasses.replace(random, params=negated), depth=20)
    assert ids(against.search(ASKED, NEAR, k=20)) == [some[::-1] for some in ids(found)]


def test_one_that_reads_finds_what_vectors_rank_low(plain):
    store = RerankedStore(plain, counting(WORDS), depth=60)
    asked = [f"where is w{i} ?" for i in range(60)]
    found = store.search(asked, -VECTORS, k=1)  # the vectors put the passage itself last
    for i, (some,) in enumerate(found):
        assert f"w{i}" in embedding_text(some.passage).split()
    assert ids(plain.search(asked, -VECTORS, k=1)) != ids(found)


def test_depth_says_how_many_are_read_and_k_may_be_more(plain, random):
    few = RerankedStore(plain, random, depth=3)
    assert ids(few.search(ASKED, NEAR, k=1)) == [
        some[:1] for some in ids(few.search(ASKED, NEAR, 3))
    ]
    for k in (1, 3):
        within = [{*some} for some in ids(plain.search(ASKED, NEAR, 3))]
        assert all(
            {*some} <= w for some, w in zip(ids(few.search(ASKED, NEAR, k)), within, strict=True)
        )
    deep = RerankedStore(plain, random, depth=10).search(ASKED, NEAR, k=10)
    assert ids(few.search(ASKED, NEAR, k=10)) == ids(deep)
    assert [len(some) for some in few.search(ASKED, NEAR, k=1000)] == [60] * 6
    with pytest.raises(ConfigError, match="depth >= 1, got 0"):
        RerankedStore(plain, random, depth=0)
    with pytest.raises(ConfigError, match="needs a KnowledgeStore, got 'words'"):
        RerankedStore("words", random)
    for k in (0, -5):
        with pytest.raises(ConfigError, match=f"k must be at least 1, got {k}"):
            few.search(ASKED, NEAR, k=k)


def test_equal_scores_are_ordered_by_id_and_no_more_are_read_for_them(random):
    store = RerankedStore(FaissStore(D), random, depth=8)
    same = [Passage(f"e{i:02}", "", "w1 w2 w3") for i in range(40)]
    vectors = unit(1) * (1 - np.arange(40)[:, None] / 100)
    order = np.random.default_rng(1).permutation(40)
    store.add([same[i] for i in order], vectors.astype(np.float32))
    nearest = sorted(same[i].id for i in order[:8])
    for k in (1, 5, 7, 8):
        assert ids(store.search(["w1"], unit(1), k=k)) == [nearest[:k]]


def test_changes_go_through_both_ways(plain, random):
    store = RerankedStore(plain, random, depth=100)
    assert len(store) == 60 and [*store.passages()] == [*plain.passages()]
    assert (store.dimension, store.cosines, store.read_only) == (D, False, False)
    new = Passage("new", "", "w1")
    store.add([new], unit(1, 3))
    assert plain.get(["new"]) == store.get(["new"]) == [new] and len(plain) == 61
    with pytest.raises(DataError, match="passage id 'new' is in the store already"):
        store.add([new], unit(1))
    news = dataclasses.replace(new, text="w2")
    store.replace([news], unit(1, 4))
    assert plain.get(["new"]) == [news]
    assert ids(plain.search([""], unit(1, 4), k=1)) == [["new"]]
    plain.delete(["p00"])
    assert "p00" not in ids(store.search(["w1"], unit(1), k=61))[0]
    store.delete(["new"])
    with pytest.raises(DataError, match="passage id 'new' is not in the store"):
        plain.get(["new"])
    store.refresh(lambda passages: -VECTORS[[int(p.id[1:]) for p in passages]])
    assert ids(plain.search([""], -VECTORS[5:6], k=1)) == [["p05"]]
    with pytest.raises(ConfigError, match=r"need vectors \[1, 16\], got \[1, 7\]"):
        store.search(["w1"], np.zeros((1, 7)))


def test_a_change_does_not_wait_for_the_cross_encoder(plain, random, monkeypatch):
    store = RerankedStore(plain, random, depth=10)
    scoring, changed = threading.Event(), threading.Event()
    scores = CrossEncoder.scores

    def slow(model, *pairs):
        scoring.set()
        assert changed.wait(timeout=60)
        return scores(model, *pairs)

    monkeypatch.setattr(CrossEncoder, "scores", slow)
    with ThreadPoolExecutor(2) as pool:
        search = pool.submit(store.search, ASKED, NEAR)
        assert scoring.wait(timeout=60)
        pool.submit(store.delete, ["p00"]).result(timeout=60)
        changed.set()
        assert [len(some) for some in search.result()] == [5] * 6


def test_a_change_waits_for_who_looks_into_the_other_store(plain, random):
    store = RerankedStore(plain, random)
    with ThreadPoolExecutor(1) as pool:
        with plain._lock:  # as a search of it holds it
            change = pool.submit(store.delete, ["p00"])
            with pytest.raises(TimeoutError):
                change.result(timeout=0.3)
            assert len(plain) == 60
        change.result(timeout=60)
    assert len(plain) == 59


def test_it_may_be_part_of_a_hybrid(plain, random):
    other = FaissStore(D)
    other.add(PASSAGES, VECTORS)
    hybrid = HybridStore([RerankedStore(plain, random), other])
    new = Passage("new", "", "w1")
    hybrid.add([new], unit(1, 3))
    assert len(plain) == 61
    assert [len(some) for some in hybrid.search(ASKED, NEAR)] == [5] * 6
    hybrid.refresh(lambda passages: unit(len(passages), 11))
    hybrid.delete(["new"])
    assert len(plain) == 60


def test_another_process_opens_a_saved_store_and_finds_the_same(plain, random, tmp_path):
    store = RerankedStore(plain, random, depth=20)
    store.delete(["p03"])
    store.save(tmp_path / "s")
    code = (
        "import json, sys, numpy\n"
        "from fedrag_jax.retrieval.stores.registry import open_store\n"
        f"store = open_store({str(tmp_path / 's')!r}, memory_map=True)\n"
        "vectors = numpy.array(json.load(sys.stdin), numpy.float32)\n"
        "found = store.search(sys.argv[1:], vectors, 7)\n"
        "print(json.dumps([store.read_only, [[[f.passage.id, f.score] for f in x] for x in found]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *ASKED],
        input=json.dumps(NEAR.tolist()),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    expected = [[[f.passage.id, f.score] for f in some] for some in store.search(ASKED, NEAR, 7)]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, expected]
    with pytest.raises(ConfigError, match="memory-mapped and cannot be changed"):
        open_store(tmp_path / "s", memory_map=True).delete(["p01"])
    again = open_store(tmp_path / "s")
    assert again.depth == 20
    again.delete(["p01"])
    again.save(tmp_path / "s")
    assert len(open_store(tmp_path / "s")) == 58


@pytest.mark.parametrize("depth", [0, -1, "9", 2.5, True, None])
def test_a_folder_with_another_depth_is_refused(plain, random, tmp_path, depth):
    RerankedStore(plain, random).save(tmp_path)
    edited(tmp_path, "store.json", settings={"depth": depth, "elsewhere": ""})
    with pytest.raises(CheckpointError, match=f"a reranked store of depth {depth!r}"):
        open_store(tmp_path)


def test_a_folder_without_its_parts_is_refused(plain, random, tmp_path):
    RerankedStore(plain, random).save(tmp_path)
    data = tmp_path / "store-data-1"
    edited(data / "cross_encoder", architectures=["AutoModel"])
    with pytest.raises(CheckpointError, match=r"\['AutoModel'\].*are not a cross-encoder"):
        open_store(tmp_path)
    edited(data / "store", "store.json", data="../../elsewhere")
    with pytest.raises(CheckpointError, match=r"store holds no store"):
        open_store(tmp_path)
    edited(tmp_path, "store.json", settings={})
    with pytest.raises(CheckpointError, match=r"holds no store"):
        open_store(tmp_path)


def test_what_lies_elsewhere_is_followed_only_if_one_says_so(random, tmp_path):
    inner = QdrantStore("passages", D, str(tmp_path / "q"))
    inner.add(PASSAGES, VECTORS)
    store = RerankedStore(inner, random)
    expected = ids(store.search(ASKED, NEAR))
    store.save(tmp_path / "s")
    inner.close()
    with pytest.raises(CheckpointError, match=rf"lie elsewhere.*{tmp_path / 'q'}"):
        open_store(tmp_path / "s")
    again = open_store(tmp_path / "s", elsewhere=True)
    assert ids(again.search(ASKED, NEAR)) == expected
    again.store.close()
    # A folder that says its passages lie in it does not lead elsewhere all the same.
    edited(tmp_path / "s", "store.json", settings={"depth": 50, "elsewhere": ""})
    with pytest.raises(CheckpointError, match="lie elsewhere"):
        open_store(tmp_path / "s")


# --- a system over it -----------------------------------------------------------------------------


def test_a_system_answers_from_it_and_weighs_by_cosines(tmp_path):
    system = RAGSystem.build(PASSAGES[:30], top_k=3)
    store = FaissStore(system.retriever.vectors.shape[1])
    store.add(PASSAGES[:30], system.embed(PASSAGES[:30]))
    over = system.over(RerankedStore(store, counting(WORDS), depth=30))
    asked = ["Where is w7?", "Where is w11?"]
    found = over.batch_query(asked)
    for i, response in zip((7, 11), found, strict=True):
        assert f"w{i}" in embedding_text(response.sources[0]).split()
        assert list(response.scores) == sorted(response.scores, reverse=True)
    read = [list(response.sources) for response in found]
    cosines = system.retriever.similarities(asked, read)
    logits = [response.scores for response in found]
    by_logits, by_cosines = (
        over.answer(asked, read, by, mode="rag_sequence_fast") for by in (logits, cosines)
    )
    assert (
        [r.answer for r in over.batch_query(asked, mode="rag_sequence_fast")]
        == by_cosines
        != by_logits
    )
    over.save(tmp_path)
    assert RAGSystem.load(tmp_path).batch_query(asked) == found
