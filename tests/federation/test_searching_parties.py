"""Retrieval over parties against the same silos in the simulator, and what parties refuse."""

import json
import types

import numpy as np
import pytest
from flwr.app import Array
from flwr.clientapp import ClientApp
from loopback import Loopback
from stored import PASSAGES, VECTORS, D, unit
from test_faults import replaced
from toy_rag import toy_parts

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.integrations.flower.parties_store import PartiesStore
from fedrag_jax.integrations.flower.party_search import encoder_of, share_passages
from fedrag_jax.retrieval.index.faiss_index import FaissIndex
from fedrag_jax.retrieval.index.silos import over_silos
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable

SILOS = np.arange(0, 90), np.arange(90, 97), np.arange(97, 200)
OVERLAPPING = np.arange(0, 90), np.arange(80, 97), np.arange(60, 200)
QUESTIONS = unit(8, seed=5)
HEADER = 128  # bytes of NumPy's format, an array
SHARED = {"fedrag-share-passages": True}


def parties(silos=SILOS, configs=(SHARED,) * 3, stores=FaissStore) -> dict:
    """Node 100 is party 0, and so on, each with an index of its own."""
    apps = {}
    for number, (rows, config) in enumerate(zip(silos, configs, strict=True)):
        store = stores(D)
        store.add([PASSAGES[row] for row in rows], VECTORS[rows])
        system = types.SimpleNamespace(store=store, retriever=toy_parts().retriever)
        app = ClientApp()
        share_passages(app, lambda context, system=system: system)
        apps[100 + number] = app, {"partition-id": number, **config}
    return apps


def store_of(apps, meddle=None, **options) -> PartiesStore:
    retriever = toy_parts().retriever
    return PartiesStore(Loopback(apps, meddle), retriever, len(apps), 5.0, **options)


def simulated(silos, **options):
    """The same silos in the simulator."""
    index = FaissIndex.build(VECTORS)
    one = Retriever(None, None, None, None, PASSAGES, VECTORS, VECTORS, index)
    return over_silos(one, silos, **options).index


@pytest.mark.parametrize("silos", [SILOS, OVERLAPPING])
@pytest.mark.parametrize("merge", ["score", "rrf"])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_passages_are_those_of_the_simulated_silos(silos, merge, k):
    found = store_of(parties(silos), merge=merge).search([""] * 8, QUESTIONS, k)
    rows, scores = simulated(silos, merge=merge).search(QUESTIONS, k)
    assert [[f.passage.id for f in some] for some in found] == [
        [PASSAGES[row].id for row in some] for some in rows
    ]
    np.testing.assert_allclose([[f.score for f in some] for some in found], scores, atol=1e-6)


def test_bytes_are_those_of_the_messages_and_of_the_simulator():
    heard, sent = [], []

    def meddle(node, message, reply):
        sent.append((message.content["model"], reply.content["model"]))
        return reply

    apps = parties()
    store_of(apps, meddle, listen=heard.append).search([""] * 8, QUESTIONS, 10)
    (searched,) = heard
    for way, told in enumerate((searched.down, searched.up)):
        assert sum(told.values()) == sum(len(x.data) for m in sent for x in m[way].values())
    traffic = simulated(SILOS).ask(QUESTIONS, 10)[2]
    assert searched.down == {"vectors float32": traffic.query_bytes.sum() + 3 * HEADER}
    numbers = searched.up["which int32"] + searched.up["scores float32"]
    assert numbers == traffic.answer_bytes.sum() + 6 * HEADER
    # Each party sends what it found, each passage once; the simulator fetches the best overall.
    assert searched.up["passages uint8"] > traffic.passage_bytes.sum() / 8
    texts = [json.loads(answer["passages"].numpy().tobytes()) for _, answer in sent]
    assert all(len({row[0] for row in rows}) == len(rows) <= 80 for rows in texts)


def test_parties_that_found_a_passage_are_told_and_equal_texts_are_one():
    searched = store_of(parties(OVERLAPPING)).ask(VECTORS[[0, 85, 150]], 1)
    assert [[f.passage.id for f in some] for some in searched.found] == [
        ["p000"],
        ["p085"],
        ["p150"],
    ]
    assert searched.holders == [[[0]], [[0, 1, 2]], [[2]]]
    assert searched.answered == [0, 1, 2] and not searched.refused


class Approximate(FaissStore):
    """Finds two passages alone for the first question, as an approximate index may."""

    def search(self, questions, vectors=None, k=5):
        found = super().search(questions, vectors, k)
        return [
            some[:2] if (vector == QUESTIONS[0]).all() else some
            for some, vector in zip(found, vectors, strict=True)
        ]


def test_an_answer_does_not_depend_on_the_other_questions():
    store = store_of(parties(stores=Approximate))
    together = store.search([""] * 8, QUESTIONS, 10)
    assert [*map(len, together)] == [6] + [10] * 7
    for i, found in enumerate(together):
        (alone,) = store.search([""], QUESTIONS[i : i + 1], 10)
        assert [f.passage for f in found] == [f.passage for f in alone]
        np.testing.assert_allclose([f.score for f in found], [f.score for f in alone], atol=1e-6)


def test_a_party_shares_nothing_unless_it_is_told_to():
    seen = []

    def meddle(node, message, reply):
        seen.append((node, reply.has_error()))
        return reply

    apps = parties(configs=({}, {"fedrag-share-passages": False}, SHARED))
    searched = store_of(apps, meddle).ask(QUESTIONS, 5)
    assert searched.answered == [2] and seen == [(100, True), (101, True), (102, False)]
    assert all("--share-passages" in searched.refused[f"node {n}"] for n in (100, 101))
    ids = {PASSAGES[row].id for row in SILOS[2]}
    assert {f.passage.id for some in searched.found for f in some} <= ids
    with pytest.raises(StoreUnreachable, match=r"no party has answered.*does not share passages"):
        store_of(parties(configs=({}, {}, {}))).ask(QUESTIONS, 5)


def array(**changed):
    """A change of some of an answer's arrays."""

    def change(reply):
        record = reply.content["model"]
        for name, value in changed.items():
            record[name] = Array(value(record[name].numpy()))
        return replaced(reply, "model", record)

    return change


def text(value):
    return lambda old: np.frombuffer(value.ljust(len(old)).encode(), np.uint8)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (array(scores=lambda x: x * np.nan), "scores is not finite"),
        (array(scores=lambda x: x[:, 1:]), r"scores is float32 \[8, 4\] but should be"),
        (array(which=lambda x: x + 10_000), "not lists of id, title and text"),
        (
            array(which=lambda x: np.where(x == 0, np.int32(-2), x)),
            "not lists of id, title and text",
        ),
        (array(which=lambda x: x - 10_000), "not lists of id, title and text"),
        (array(passages=lambda x: x[1:]), "passages is uint8"),
        (array(passages=text("[")), "no JSON"),
        (array(passages=text("{}")), "not lists of id, title and text"),
        (array(passages=text('[["p", "", 3]]')), "not lists of id, title and text"),
    ],
)
def test_answers_that_are_none_are_refused(change, why):
    def meddle(node, message, reply):
        return change(reply) if node == 101 else reply

    searched = store_of(parties(), meddle).ask(QUESTIONS, 5)
    assert searched.answered == [0, 2]
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(searched.refused["node 101"])


def test_parties_that_cannot_answer_are_named():
    apps = parties()
    apps[103] = apps[102]  # two nodes of one number
    system = types.SimpleNamespace(store=None, retriever=toy_parts().retriever)
    apps[104] = ClientApp(), {"partition-id": 4, **SHARED}
    share_passages(apps[104][0], lambda context: system)
    apps[105] = apps[101][0], SHARED
    searched = store_of(apps, lambda node, _, reply: None if node == 100 else reply).ask(
        QUESTIONS, 5
    )
    assert searched.answered == [1, 2]
    told = {
        100: "no answer in 5 s", 103: "its number is 2, which another node has already",
        104: "has no store of vectors", 105: "partition-id",
    }  # fmt: skip
    assert {*searched.refused} == {f"node {node}" for node in told}
    assert all(why in searched.refused[f"node {node}"] for node, why in told.items())


def test_a_party_of_another_encoder_is_refused():
    retriever = toy_parts().retriever
    other = retriever.with_head(np.eye(D, dtype=np.float32))
    assert encoder_of(other) != encoder_of(retriever) == encoder_of(retriever)
    store = PartiesStore(Loopback(parties()), other, 3, 5.0)
    with pytest.raises(StoreUnreachable, match="with another encoder than the server"):
        store.ask(QUESTIONS, 5)


def test_searches_that_cannot_be_are_refused(tmp_path):
    store = store_of(parties())
    with pytest.raises(ConfigError, match="k must be at least 1"):
        store.search([""], QUESTIONS[:1], 0)
    with pytest.raises(ConfigError, match=r"vectors \[1, 16\], got None"):
        store.search([""])
    with pytest.raises(DataError, match="question"):
        store.search([""], QUESTIONS[:1] * np.nan)
    with pytest.raises(ConfigError, match="cannot be saved"):
        store.save(tmp_path)
    assert store.search([]) == []
    for options in ({"merge": "best"}, {"parties": 0}):
        with pytest.raises(ConfigError, match="must be"):
            PartiesStore(Loopback({}), toy_parts().retriever, **{"parties": 1} | options)
    with pytest.raises(StoreUnreachable, match="no node has come"):
        PartiesStore(Loopback({}), toy_parts().retriever, 1, 0.1).ask(QUESTIONS, 5)
