"""Stores whose passages lie elsewhere: Qdrant's folders and servers, and tables of Postgres."""

import json
import os

import numpy as np
import pytest
import qdrant_client
from stored import PASSAGES, VECTORS, D, ask, ids, in_postgres, postgres, unit

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.postgres import PostgresStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore
from fedrag_jax.retrieval.stores.registry import open_store


def test_an_embedded_qdrant_lies_in_its_folder(tmp_path, monkeypatch):
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
    # A relative folder is found from any other, and what is gone is not made anew.
    monkeypatch.chdir(tmp_path)
    QdrantStore("passages", D, "q").save(tmp_path / "r")
    monkeypatch.chdir("/")
    again = open_store(tmp_path / "r", elsewhere=True)
    assert len(again) == 200
    again.close()
    (tmp_path / "q").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the Qdrant folder .*/q does not exist"):
        open_store(tmp_path / "r", elsewhere=True)
    assert not (tmp_path / "q").exists()
    (tmp_path / "moved").rename(tmp_path / "q")
    with pytest.raises(ConfigError, match="dimension 16, not 17"):
        QdrantStore("passages", 17, str(tmp_path / "q"))


@pytest.mark.parametrize("create", [True, False])
def test_a_collection_of_another_program_is_left_alone(tmp_path, create):
    client = qdrant_client.QdrantClient(path=str(tmp_path))
    vectors = qdrant_client.models.VectorParams(size=D, distance="Cosine")
    client.create_collection("theirs", vectors)
    client.close()
    with pytest.raises(ConfigError, match=r"'theirs' that is no store.*choose another name"):
        QdrantStore("theirs", D, str(tmp_path), create=create)
    client = qdrant_client.QdrantClient(path=str(tmp_path))
    assert [c.name for c in client.get_collections().collections] == ["theirs"]
    client.close()


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
def test_hnsw_in_postgres_finds_more_passages_than_its_effort():
    store = in_postgres(index="hnsw", effort=64)
    passages = [Passage(f"{i:04}", "", "A text.") for i in range(3000)]
    store.add(passages, unit(3000, seed=1))
    (found,) = store.search(["?"], unit(1), k=300)
    assert len(found) == 300
    exact = np.argsort(-unit(3000, seed=1) @ unit(1)[0])[:300]
    assert len({int(f.passage.id) for f in found} & {*exact.tolist()}) > 250
    # Above pgvector's limit PostgreSQL decides whether it looks into the index or into the table.
    assert 1000 <= len(store.search(["?"], unit(1), k=2000)[0]) <= 2000
    assert len(store.search(["?"], unit(1), k=5)[0]) == 5


@pytest.mark.slow
def test_an_exact_store_in_postgres_searches_exactly_in_a_table_with_an_hnsw_index():
    approximate, vectors, asked = in_postgres(index="hnsw"), unit(3000, seed=1), unit(9, seed=2)
    approximate.add([Passage(f"{i:04}", "", "A text.") for i in range(3000)], vectors)
    approximate._run("ANALYZE {table}")
    exact = PostgresStore(postgres(), approximate.table, D)
    best = np.argsort(-asked @ vectors.T)[:, :100]
    assert ids(exact.search(["?"] * 9, asked, k=100)) == [[f"{i:04}" for i in row] for row in best]


def test_more_dimensions_than_an_hnsw_index_takes_are_refused_before_the_database_is_asked():
    with pytest.raises(
        ConfigError, match=r"table 'wide': dimension must be at most 2000.*got 2560"
    ):
        PostgresStore("host=127.0.0.1 port=9 connect_timeout=2", "wide", 2560, index="hnsw")


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
    secret = PostgresStore(postgres() + "&password=secret&sslpassword=secret", store.table, D)
    assert "secret" not in json.dumps(secret._settings())
    with pytest.raises(CheckpointError, match="table gone does not exist"):
        PostgresStore(postgres(), "gone", D, create=False)
