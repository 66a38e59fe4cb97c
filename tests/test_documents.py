"""The quickstart and the examples of README and docs run as they are printed."""

import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from fedrag_jax.data import datasets
from fedrag_jax.rag import RAGSystem

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_notebook():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    here = {"metadata": {"path": ROOT / "notebooks"}}
    NotebookClient(notebook, timeout=600, resources=here).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any("| federated " in o.get("data", {}).get("text/markdown", "") for o in outputs)


def code_of(page: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.slow
def test_documents_alone_become_a_tuned_system(tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    with open(tmp_path / "path" / "to" / "passages.jsonl", "w", encoding="utf-8") as file:
        for passage in datasets.load("chatty_world").passages[:60]:
            file.write(json.dumps({"id": passage.id, "title": "", "text": passage.text}) + "\n")
    monkeypatch.chdir(tmp_path)
    (block,) = code_of("docs/label_free.md")
    exec(compile(block.replace("local_steps=100", "local_steps=3"), "label_free.md", "exec"), {})
    system = RAGSystem.load("tuned")
    assert system.query("Who?").sources


def test_the_readme_example_trains():
    blocks = code_of("README.md")
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    first, last = scope["result"].history[0], scope["result"].history[-1]
    assert last["loss"] < first["loss"]
