"""Tables and figures of README and docs are those of the rows that are kept; see also `test_pages`."""

import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from printed import ROOT, python_of

from experiments.reporting import tables
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


def kept(folder: str, table: str) -> dict[tuple[str, str], dict]:
    """Rows of a kept experiment by strategy and regime."""
    rows = read_csv(ROOT / "docs/data" / folder / f"{table}.csv")
    return {(row["strategy"], row["regime"]): row for row in rows}


def as_cell(row: dict, metric: str) -> str:
    """How pages print a metric: mean, deviation over the seeds if there are several, interval."""
    value, low, high, sd = (row[metric + x] for x in ("", "_low", "_high", "_sd"))
    spread = f" ± {sd:.1f}" if row["seeds"] > 1 and row["strategy"] != "none" else ""
    return f"{value:.1f}{spread} [{low:.1f}, {high:.1f}]"


@pytest.mark.parametrize(
    ("page", "folder", "metrics", "cells"),
    [("README.md", "real", ["em"], 9), ("docs/results.md", "table", ["em", "recall_at_5"], 31)],
)
def test_tables_of_strategies_by_regimes_are_the_rows_that_are_kept(page, folder, metrics, cells):
    rows, controls = kept(folder, "strategies"), kept(folder, "controls")
    found = [t for t in shown_tables(page) if t[0][:2] == ["strategy", "centralised"]]
    assert len(found) == len(metrics)
    for metric, (head, _, *lines) in zip(metrics, found, strict=True):
        told = 0
        for name, *shown in lines:
            strategy = "none" if name == "untuned" else name.removesuffix("` (both)")
            for title, cell in zip(head[1:], shown, strict=True):
                if title == "without passages":
                    closed = controls[strategy, "centralised"]["closed_book_em"]
                    assert cell == f"{closed:.1f}", name
                elif cell:
                    told += 1
                    assert cell == as_cell(rows[strategy, title], metric), (name, title)
        assert told == cells, metric


@pytest.mark.parametrize(
    ("folder", "gold", "number"), [("real", "gold_em", 0), ("real_hotpotqa", "gold_em_two_hop", 1)]
)
def test_the_tables_of_real_text_are_the_rows_that_are_kept(folder, gold, number):
    rows, controls = kept(folder, "strategies"), kept(folder, "controls")
    assert rows.pop(("none", "federated"))["em"] == rows["none", "centralised"]["em"]
    found = [t for t in shown_tables("docs/results.md") if "EM without passages" in t[0]]
    table = found[number]
    assert len(found) == 2
    strategy = ""
    for name, regime, *shown in table[2:]:
        strategy = {"": strategy, "untuned": "none"}.get(name, name)
        where = strategy, "federated" if regime == "federated" else "centralised"
        row, control = rows.pop(where), controls[where]
        of_metrics = [as_cell(row, metric) for metric in ("em", "f1", "recall_at_5", "mrr")]
        of_controls = [f"{control[x]:.1f}" for x in ("closed_book_em", "distractor_em", gold)]
        assert shown == of_metrics + of_controls, where
    assert not rows


def test_the_table_of_other_stores_is_the_rows_that_are_kept():
    rows = read_csv(ROOT / "docs/data/over_stores/over_stores.csv")
    kept = {(r["store"], r["strategy"], r["regime"] or ""): r for r in rows}
    (table,) = [t for t in shown_tables("docs/results.md") if "passages from" in t[0]]
    stores = {"BM25": "bm25", "BM25 and vectors": "hybrid"}
    for store, generator, *shown, difference in table[2:]:
        strategy = "none" if generator == "untuned" else "generator"
        regime = {"tuned, pooled": "centralised", "tuned, federated": "federated"}.get(
            generator, ""
        )
        row = kept[stores[store], strategy, regime]
        assert shown == [as_cell(row, metric) for metric in ("em", "f1", "recall_at_5", "mrr")]
        ends = [tables.signed(row[f"em_over_{x}"], 1) for x in ("difference", "low", "high")]
        assert difference == "{} [{}, {}]".format(*ends).replace("-", "−")


@pytest.mark.parametrize(
    ("folder", "name", "how"), [("table", "strategies", []), ("real", "real", ["--cost=flops"])]
)
def test_figures_are_drawn_from_the_rows_that_are_kept(tmp_path, folder, name, how):
    command = [sys.executable, "-m", "experiments.redraw"]
    rows, figure = ROOT / "docs/data" / folder / "strategies.csv", tmp_path / "figure.png"
    ran = subprocess.run([*command, rows, figure, *how], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    drawn, shown = (plt.imread(path) for path in (figure, ROOT / f"docs/{name}.png"))
    assert abs(drawn.shape[0] - shown.shape[0]) < 40 and abs(drawn.shape[1] - shown.shape[1]) < 40
    nowhere = subprocess.run(
        [*command, rows, tmp_path / "none" / "figure.png"], cwd=ROOT, capture_output=True, text=True
    )
    assert nowhere.returncode == 1 and nowhere.stderr.startswith("FileNotFoundError")
    (tmp_path / "empty.csv").write_text("a,b\n")
    command += [tmp_path / "empty.csv", figure]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "holds no rows" in ran.stderr
