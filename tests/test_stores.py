"""One battery for every kind of store."""

import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cross_encoders import counting
from stored import COUNT, FAISS, PASSAGES, VECTORS, D, ask, ids, in_postgres, unit

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.stores import device_store
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.device_store import DeviceStore
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.registry import open_store
from fedrag_jax.retrieval.stores.reranked import RerankedStore

# Counts the words that question and passage share.
READS = counting([*(f"number{i}" for i in range(200)), "changed5", "changed9"])
KINDS = {
    **FAISS,
    "qdrant": lambda: QdrantStore("passages", D),
    "device": lambda: DeviceStore(D),
    "bm25": BM25Store,
    "hybrid": lambda: HybridStore([FaissStore(D), DeviceStore(D), BM25Store("english")]),
    "reranked": lambda: RerankedStore(FaissStore(D), READS, depth=20),
}
ELSEWHERE = [pytest.param(name, marks=pytest.mark.slow) for name in ("postgres", "qdrant_server")]


@pytest.fixture(params=[*KINDS, *ELSEWHERE])
def empty(request):
    if request.param == "postgres":
        return in_postgres()
    if request.param == "qdrant_server":
        name = f"test-{os.getpid()}-{next(COUNT)}"
        return QdrantStore(name, D, request.getfixturevalue("qdrant"))
    return KINDS[request.param]()


@pytest.fixture
def store(empty):
    empty.add(PASSAGES, VECTORS)
    return empty


def test_what_is_there_is_found_whole_and_best_first(store):
    assert len(store) == 200
    found = ask(store, range(0, 200, 7))
    assert [some[0].passage for some in found] == PASSAGES[::7]
    for some in found:
        scores = [f.score for f in some]
        assert scores == sorted(scores, reverse=True) and len({f.passage.id for f in some}) == len(
            some
        )
    assert store.get(["p003", "p001"]) == [PASSAGES[3], PASSAGES[1]]
    assert sorted(p.id for p in store.passages()) == [p.id for p in PASSAGES]


def test_vectors_are_searched_by_inner_product(store):
    if store.kind in ("bm25", "hybrid", "reranked"):
        pytest.skip("not by vectors alone")
    questions = unit(20, seed=1)
    found = store.search([""] * 20, questions, k=10)
    exact = np.argsort(-questions @ VECTORS.T, axis=1)[:, :10]
    assert ids(found) == [[PASSAGES[row].id for row in rows] for rows in exact]
    best = (questions @ VECTORS.T).max(axis=1)
    np.testing.assert_allclose([some[0].score for some in found], best, atol=1e-5)


def test_an_empty_store_finds_nothing_and_takes_what_comes_one_by_one(empty):
    assert len(empty) == 0 and ask(empty, [1, 2]) == [[], []]
    assert empty.search([], np.empty((0, D), np.float32)) == []
    for row in range(3):
        empty.add([PASSAGES[row]], VECTORS[row : row + 1])
    assert ids(ask(empty, [1], k=1)) == [["p001"]]
    assert len(ask(empty, [1], k=5)[0]) <= 3
    empty.delete(["p000", "p001", "p002"])
    assert len(empty) == 0 and ask(empty, [1]) == [[]]
    empty.add(PASSAGES, VECTORS)
    assert ids(ask(empty, [199], k=1)) == [["p199"]]


def test_a_deleted_passage_is_gone_and_may_come_back(store):
    gone = [p.id for p in PASSAGES[::2]]
    store.delete([*gone, "p000"])  # twice is once
    assert len(store) == 100
    assert not {i for some in ids(ask(store, range(200), k=20)) for i in some} & {*gone}
    assert ids(ask(store, [1, 3], k=1)) == [["p001"], ["p003"]]
    with pytest.raises(DataError, match="passage id 'p000' is not in the store"):
        store.get(["p000"])
    store.add(PASSAGES[:1], VECTORS[:1])
    assert ids(ask(store, [0], k=1)) == [["p000"]] and len(store) == 101


def test_a_replaced_passage_is_found_by_what_it_says_now(store):
    news = [dataclasses.replace(PASSAGES[i], text=f"changed{i}") for i in (5, 9)]
    store.replace(news, unit(2, seed=7))
    assert len(store) == 200 and store.get(["p005"]) == news[:1]
    found = store.search(["changed5", "changed9"], unit(2, seed=7), k=1)
    assert [some[0].passage for some in found] == news


def test_what_cannot_be_is_refused_and_nothing_is_lost(store):
    new = Passage("new", "", "new")
    with pytest.raises(DataError, match="passage id 'p007' is in the store already"):
        store.add([new, PASSAGES[7]], unit(2))
    with pytest.raises(DataError, match="passage id 'new' occurs twice"):
        store.add([new, new], unit(2))
    for change in (lambda: store.replace([new], unit(1)), lambda: store.delete(["p001", "new"])):
        with pytest.raises(DataError, match="passage id 'new' is not in the store"):
            change()
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        ask(store, [1], k=0)
    if store.dimension is not None:
        with pytest.raises(ConfigError, match=r"need vectors \[1, 16\], got \[1, 17\]"):
            store.add([new], np.zeros((1, 17), np.float32))
        with pytest.raises(ConfigError, match=r"need vectors \[2, 16\], got \[1, 16\]"):
            store.search(["a", "b"], VECTORS[:1])
        with pytest.raises(ConfigError, match="needs the vectors of a question"):
            store.search(["a"])
        with pytest.raises(DataError, match="not finite"):
            store.replace(PASSAGES[:1], np.full((1, D), np.nan))
    for bad, words in (
        (Passage("half", "", "\ud800"), "passage 'half' holds half a character"),
        (Passage("none", None, "text"), "passage 'none' has None for a text"),
    ):
        with pytest.raises(DataError, match=words):
            store.add([new, bad], unit(2))
    for several in (lambda: store.delete("p001"), lambda: store.get("p001")):
        with pytest.raises(ConfigError, match="ids must be a list of strings"):
            several()
    with pytest.raises(ConfigError, match="questions must be a list of strings"):
        store.search("number7", VECTORS[:7])
    store.add([])
    assert len(store) == 200 and ids(ask(store, [7], k=1)) == [["p007"]]


def test_a_saved_store_opens_as_it_was_and_can_be_saved_over(store, tmp_path):
    store.delete(["p010"])
    store.save(tmp_path / "s")
    again = open_store(tmp_path / "s", elsewhere=True)
    assert type(again) is type(store) and len(again) == 199
    assert ask(again, range(40)) == ask(store, range(40))
    again.add(PASSAGES[10:11], VECTORS[10:11])
    again.save(tmp_path / "s")
    assert ids(ask(open_store(tmp_path / "s", elsewhere=True), [10], k=1)) == [["p010"]]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["store-data-2", "store.json"]


def test_searches_during_a_refresh_see_the_old_or_the_new(store):
    if store.dimension is None:
        pytest.skip("words alone")
    old, new = ids(ask(store, range(10))), None
    turned = -VECTORS
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(ids(ask(store, range(10))))

    def embed(passages):
        time.sleep(0.2)  # so that searches come in between
        return turned[[int(p.id[1:]) for p in passages]]

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(look) for _ in range(3)]
        try:
            store.refresh(embed)
            new = ids(ask(store, range(10)))
            time.sleep(0.1)
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert old != new and seen.count(old) and seen.count(new)
    assert seen.count(old) + seen.count(new) == len(seen)


def test_many_threads_change_and_search(empty):
    empty.add(PASSAGES[:100], VECTORS[:100])
    faults = []

    def change(start):
        for row in range(start, 200, 4):
            empty.add([PASSAGES[row]], VECTORS[row : row + 1])
            empty.delete([PASSAGES[row - 100].id])

    def look():
        for _ in range(50):
            for some in ask(empty, range(0, 200, 20)):
                if any(f.passage != PASSAGES[int(f.passage.id[1:])] for f in some):
                    faults.append(some)

    with ThreadPoolExecutor(7) as pool:
        done = [pool.submit(change, 100 + i) for i in range(4)]
        done += [pool.submit(look) for _ in range(3)]
        for each in done:
            each.result()
    assert not faults and sorted(p.id for p in empty.passages()) == [p.id for p in PASSAGES[100:]]


def test_equal_scores_are_ordered_by_id_and_stay_so(empty, tmp_path):
    same = [Passage(f"e{i:02}", "", "the same words") for i in range(30)]
    one = np.tile(unit(1), (30, 1))
    for row in range(29, -1, -1):
        empty.add(same[row : row + 1], one[row : row + 1])
    (found,) = empty.search(["same words"], one[:1], k=5)
    assert [f.passage.id for f in found] == ["e00", "e01", "e02", "e03", "e04"]
    empty.save(tmp_path)
    (again,) = open_store(tmp_path, elsewhere=True).search(["same words"], one[:1], k=5)
    assert again == found


def test_saving_leaves_what_is_not_its_own(store, tmp_path):
    for name in ("data-1", "store-data-x", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    store.save(tmp_path)
    store.save(tmp_path)
    assert len([*tmp_path.rglob("mine.txt")]) == 3


def test_a_save_that_fails_leaves_the_former_store(store, tmp_path, monkeypatch):
    store.save(tmp_path)

    def fails(folder):
        (folder / "half").write_text("half")
        raise OSError("no space left")

    store.delete(["p001"])
    monkeypatch.setattr(store, "_save", fails)
    with pytest.raises(ConfigError, match=r"cannot be written \(no space left\): make room"):
        store.save(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    if not store.lies_elsewhere(store._settings()):
        assert len(open_store(tmp_path)) == 200


def test_who_opens_while_another_saves_gets_a_whole_store(store, tmp_path):
    if store.lies_elsewhere(store._settings()):
        pytest.skip("its passages lie in no folder")
    store.save(tmp_path)
    stop = threading.Event()

    def save():
        while not stop.is_set():
            store.save(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        saving = [pool.submit(save) for _ in range(2)]
        try:
            for _ in range(10):
                assert len(open_store(tmp_path)) == 200
        finally:
            stop.set()
        for each in saving:
            each.result()


class Failing(BM25Store):
    """A store whose server goes away at the first deletion."""

    failed = False

    def _delete(self, ids):
        if not self.failed:
            self.failed = True
            raise StoreUnreachable("gone")
        super()._delete(ids)


@pytest.mark.parametrize("parts", [(FaissStore, Failing), (Failing, FaissStore)])
def test_a_deletion_that_fails_in_part_can_be_made_again(tmp_path, parts):
    stores = [make(D) if make is FaissStore else make("english") for make in parts]
    store = HybridStore(stores)
    store.add(PASSAGES[:10], VECTORS[:10])
    with pytest.raises(StoreUnreachable):
        store.delete(["p003"])
    store.delete(["p003"])
    assert len(store) == 9 and [len(part) for part in store.parts] == [9, 9]
    assert "p003" not in {found for some in ids(ask(store, range(10), k=10)) for found in some}


def test_a_device_without_room_changes_nothing(monkeypatch):
    store = DeviceStore(D)
    store.add(PASSAGES[:5], VECTORS[:5])
    found = ids(ask(store, range(5)))
    with monkeypatch.context() as patch:
        patch.setattr(device_store, "_grown", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            store.add(PASSAGES[5:9], VECTORS[5:9])
    assert len(store) == 5 and ids(ask(store, range(5))) == found
    store.add(PASSAGES[5:9], VECTORS[5:9])
    assert len(store) == 9 and ids(ask(store, [7], k=1)) == [["p007"]]
