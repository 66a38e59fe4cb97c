"""Saved systems: what is saved is what is loaded, and a save that fails leaves the old system there."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.store_index import StoreIndex
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.systems.system_like import system_like

WORLD = synthetic.generate(synthetic.WorldConfig(people=20, works=20, questions=(40, 20, 20)))
PASSAGES = WORLD.passages[:60]
QUESTIONS = [e.question for e in WORLD.test[:4]]


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(PASSAGES, top_k=2)


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * factor, tree)


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class Killing(FaissStore):
    """A store whose process is killed while it is saved."""

    def save(self, path):
        os._exit(9)


def test_a_save_that_fails_leaves_the_old_system(system, tmp_path):
    """Also one that is killed, and files of others beside the system."""
    expected = system.batch_query(QUESTIONS)
    system.save(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    there = files_of(tmp_path)
    broken = [
        system.replace(adapters=scaled(system.adapters, np.nan)),
        system.replace(query=scaled(system.retriever.query, np.inf)),
    ]
    for other in broken:
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}/\w+: .*nothing was written"):
            other.save(tmp_path)
        assert RAGSystem.load(tmp_path).batch_query(QUESTIONS) == expected
        assert files_of(tmp_path) == there
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_saved_systems import *\n"
        "RAGSystem.build(PASSAGES[:9], top_k=1, store=Killing(64)).save(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), __file__.rpartition("/")[0]]
    assert subprocess.run(command).returncode == 9
    assert RAGSystem.load(tmp_path).batch_query(QUESTIONS) == expected
    system.save(tmp_path)
    assert files_of(tmp_path) == there and (tmp_path / "store" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "part",
    ["generator", "document_encoder", "query_encoder", "adapters", "head.safetensors",
     "passages.jsonl", "system.json"],
)  # fmt: skip
def test_a_save_replaces_no_file_or_folder_of_others(system, tmp_path, part):
    own = tmp_path / part if "." in part else tmp_path / part / "notes.txt"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    where = re.escape(str(tmp_path / part))
    with pytest.raises(
        CheckpointError, match=f"^{where} is not of a saved system and would be lost"
    ):
        system.save(tmp_path)
    assert files_of(tmp_path) == {str(own.relative_to(tmp_path))} and own.read_text() == "mine"


def test_the_folder_of_a_first_save_that_was_killed_can_be_saved_to(system, tmp_path):
    (tmp_path / ".saving" / "generator").mkdir(parents=True)
    system.save(tmp_path)
    assert RAGSystem.load(tmp_path).batch_query(QUESTIONS) == system.batch_query(QUESTIONS)


@pytest.mark.parametrize("moved", [(), ("generator", "passages.jsonl"), ("system.json",)])
def test_a_save_that_is_killed_while_it_moves_parts_has_saved(system, tmp_path, moved):
    tuned = system.replace(
        adapters=jax.tree.map(lambda x: x + 0.01, system.adapters),
        query=scaled(system.retriever.query, 1.01),
    )
    tuned = RAGSystem.build(PASSAGES[:50], top_k=1).replace(
        adapters=tuned.adapters, query=tuned.retriever.query
    )
    here, new = tmp_path / "s", tmp_path / "new"
    system.replace(head=np.eye(64, dtype=np.float32)[::-1].copy()).save(here)
    tuned.save(new)
    new.rename(here / ".saved")
    for name in moved:  # the last of them has lost its old one alone
        (here / name).rename(here / ".saved" / f"former {name}")
        if name != moved[-1]:
            (here / ".saved" / name).rename(here / name)
    loaded = RAGSystem.load(here)
    assert loaded.batch_query(QUESTIONS) == tuned.batch_query(QUESTIONS)
    assert loaded.retriever.head is None and loaded.top_k == 1
    tuned.save(here)
    tuned.save(new)
    assert files_of(here) == files_of(new)
    assert RAGSystem.load(here).batch_query(QUESTIONS) == tuned.batch_query(QUESTIONS)


def test_the_kind_of_index_and_the_type_of_vectors_are_saved(tmp_path):
    options = {"lists": 2, "probes": 1}
    system = RAGSystem.build(
        PASSAGES, top_k=2, index="ivf", index_options=options, vectors="float16"
    )
    system.save(tmp_path)
    loaded = RAGSystem.load(tmp_path)
    for same in (loaded, system_like(loaded, PASSAGES)):
        assert (same.index, same.index_options) == ("ivf", options)
        assert same.retriever.index.kind == system.retriever.index.kind
        assert same.retriever.vectors.dtype == np.float16
        assert same.batch_query(QUESTIONS) == system.batch_query(QUESTIONS)
    settings = json.loads((tmp_path / "system.json").read_text())
    for name in ("index", "index_options", "vectors", "head"):
        del settings[name]  # as older versions saved it
    (tmp_path / "system.json").write_text(json.dumps(settings))
    loaded = RAGSystem.load(tmp_path)
    assert loaded.index == "flat" and loaded.retriever.vectors.dtype == np.float32


@pytest.mark.parametrize(
    ("index", "at", "public"),
    [
        ("postgres", "postgresql://me:secret@host/db", "user=me dbname=db host=host"),
        ("qdrant", "https://me:secret@host:6333", "https://host:6333"),
        ("qdrant", "folder", os.path.abspath("folder")),
    ],
)
def test_an_index_in_a_service_is_saved_without_passwords_and_opens_with_consent(
    tmp_path, index, at, public
):
    pytest.importorskip({"postgres": "psycopg", "qdrant": "qdrant_client"}[index])
    options = {"at": at, "collection": "mine"}
    store = FaissStore(64)
    system = RAGSystem.build(store=store, index=index, index_options=options)
    system.save(tmp_path)
    assert "secret" not in (tmp_path / "system.json").read_text()
    with pytest.raises(CheckpointError, match=r"index is a service's, .*elsewhere=True"):
        RAGSystem.load(tmp_path)
    loaded = RAGSystem.load(tmp_path, elsewhere=True)
    assert loaded.index_options == {"at": public, "collection": "mine"}
    # Another corpus does not take the place of the vectors there.
    assert system_like(loaded, PASSAGES).index == "flat"


def test_an_index_in_a_folder_is_opened_again(tmp_path):
    pytest.importorskip("qdrant_client")
    options = {"at": str(tmp_path / "qdrant")}
    system = RAGSystem.build(PASSAGES, top_k=2, index="qdrant", index_options=options)
    expected = system.batch_query(QUESTIONS)
    system.save(tmp_path / "s")
    system.retriever.index.store.close()
    loaded = RAGSystem.load(tmp_path / "s", elsewhere=True)
    assert isinstance(loaded.retriever.index, StoreIndex)
    assert loaded.batch_query(QUESTIONS) == expected


def test_a_truncated_retriever_over_a_store_is_loaded(system, tmp_path):
    cut = dataclasses.replace(system, retriever=system.retriever.cut(32))
    store = FaissStore(32)
    store.add(PASSAGES, cut.embed(PASSAGES))
    over = cut.over(store)
    over.save(tmp_path)
    for same in (RAGSystem.load(tmp_path), system_like(over, store=store)):
        assert same.retriever.vectors.shape[1] == same.store.dimension == 32
        assert same.batch_query(QUESTIONS) == over.batch_query(QUESTIONS)
    assert RAGSystem.load(tmp_path).over(None).batch_query(QUESTIONS) == cut.batch_query(QUESTIONS)


def test_parameters_keep_their_type(tmp_path):
    names = {"generator": "builtin:decoder", "retriever": "builtin:encoder"}
    models = {part: hub.load(name, jnp.bfloat16) for part, name in names.items()}
    system = RAGSystem.build(PASSAGES, top_k=2, **models)
    system.save(tmp_path)
    loaded = RAGSystem.load(tmp_path)
    pairs = [
        (s.generator.params, s.retriever.query, s.retriever.document) for s in (loaded, system)
    ]
    for found, expected in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert found.dtype == expected.dtype == jnp.bfloat16
        assert (found == expected).all()
    assert loaded.batch_query(QUESTIONS) == system.batch_query(QUESTIONS)
