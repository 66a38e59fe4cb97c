"""Tables and figures of README and docs are those of the rows that are kept; see also `test_pages`."""

import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from printed import ROOT, python_of

from experiments.reporting.tables import read_csv
from fedrag_jax.data import datasets
from fedrag_jax.rag import RAGSystem


@pytest.mark.slow
def test_documents_alone_become_a_tuned_system(tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    with open(tmp_path / "path" / "to" / "passages.jsonl", "w", encoding="utf-8") as file:
        for passage in datasets.load("chatty_world").passages[:60]:
            file.write(json.dumps({"id": passage.id, "title": "", "text": passage.text}) + "\n")
    monkeypatch.chdir(tmp_path)
    (block,) = python_of("docs/label_free.md")
    exec(
        compile(block.text.replace("local_steps=100", "local_steps=3"), "label_free.md", "exec"), {}
    )
    system = RAGSystem.load("tuned")
    assert system.query("Who?").sources


def shown_tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: their lines, their cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", (ROOT / page).read_text(), re.MULTILINE)
    return [
        [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in block.splitlines()]
        for block in blocks
    ]


README_REGIMES = {
    "centralised": "centralised_converged",
    "federated": "federated_converged",
    "each client alone": "local_converged",
}


@pytest.mark.parametrize(
    ("page", "metrics", "regimes"),
    [("README.md", ["em"], README_REGIMES), ("docs/results.md", ["em", "recall_at_5"], {})],
)
def test_the_main_tables_are_the_rows_that_are_kept(page, metrics, regimes):
    rows = read_csv(ROOT / "docs/data/table/strategies.csv")
    kept = {(row["strategy"], row["regime"]): row for row in rows}
    found = [
        table
        for table in shown_tables(page)
        if table[0][0] == "strategy"
        and ("retriever", regimes.get(table[0][1], table[0][1])) in kept
    ]
    assert len(found) == len(metrics)
    for metric, (head, _, *lines) in zip(metrics, found, strict=True):
        told = 0
        for strategy, *shown in lines:
            for title, cell in zip(head[1:], shown, strict=True):
                where = "none" if strategy == "untuned" else strategy, regimes.get(title, title)
                if cell:
                    row, told = kept[where], told + 1
                    value, low, high, sd = (row[metric + x] for x in ("", "_low", "_high", "_sd"))
                    spread = f" ± {sd:.1f}" if strategy != "untuned" else ""
                    assert cell == f"{value:.1f}{spread} [{low:.1f}, {high:.1f}]", where
        assert told >= 15, metric


def test_the_figure_is_drawn_from_the_rows_that_are_kept(tmp_path):
    command = [sys.executable, "-m", "experiments.redraw"]
    rows, figure = ROOT / "docs/data/table/strategies.csv", tmp_path / "figure.png"
    ran = subprocess.run([*command, rows, figure], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    drawn, shown = (plt.imread(path) for path in (figure, ROOT / "docs/strategies.png"))
    assert abs(drawn.shape[0] - shown.shape[0]) < 40 and abs(drawn.shape[1] - shown.shape[1]) < 40
    (tmp_path / "empty.csv").write_text("a,b\n")
    command += [tmp_path / "empty.csv", figure]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "holds no rows" in ran.stderr
