"""Folders of saved stores that hold something else, or are damaged, are refused."""

import json

import pytest
from stored import PASSAGES, VECTORS, D

from fedrag_jax.errors import CheckpointError
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.registry import open_store

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
