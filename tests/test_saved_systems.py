"""Saved systems: what is saved is what is loaded, and a save that fails leaves the old system there."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.errors import CheckpointError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.faiss_store import FaissStore

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
        import os

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
