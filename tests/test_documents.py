"""The examples of README and docs run as they are printed."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from ml_collections.config_flags import config_path

from experiments.__main__ import CONFIGS
from experiments.reporting.tables import read_csv
from fedrag_jax.data import datasets
from fedrag_jax.rag import RAGSystem

ROOT = pathlib.Path(__file__).parent.parent


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


@pytest.mark.slow
def test_the_example_of_learning_to_search_runs():
    scope = {}
    (block,) = [b for b in code_of("docs/objectives.md") if "search_policy" in b]
    exec(compile(block, "docs/objectives.md", "exec"), scope)
    told = scope["result"].history[0]["metrics"]
    assert {"reward", "entropy", "searches", "malformed"} <= {*told}


@pytest.mark.parametrize(
    ("page", "number"), [("README.md", 0), ("docs/objectives.md", 1)], ids=["readme", "own"]
)
def test_the_examples_train(page, number):
    scope = {}
    exec(compile(code_of(page)[number], page, "exec"), scope)
    first, last = scope["result"].history[0], scope["result"].history[-1]
    assert last["loss"] < first["loss"]


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


def printed_commands() -> list[tuple[str, str]]:
    """Where an experiment is called in the docs, the Makefile and docstrings, and its arguments."""
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    pages += [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    found = []
    for page in pages:
        text = page.read_text().replace("$(COMPARE)", "python -m experiments compare_strategies")
        text = text.replace("$(REAL)", text.partition("REAL := ")[2].partition("\n")[0])
        text = re.sub(r"\\\n\s*", "", text)
        for line in re.findall(r"python -m (experiments[ .][^`\n]*)", text):
            found.append((str(page.relative_to(ROOT)), line.partition(" #")[0]))
    return found


def test_printed_commands_set_what_their_configs_have():
    commands = printed_commands()
    assert len(commands) > 30
    wrong = []
    for page, line in commands:
        words = line.split()
        given = re.search(r"--config[= ](configs/\w+\.py)(?::(\w+))?", line)
        name = words[1] if words[0] == "experiments" else "compare_strategies"
        path = given.group(1) if given else f"configs/{CONFIGS.get(name, name)}.py"
        if not re.fullmatch(r"\w+", name):
            continue  # a placeholder, or --help
        variant = [given.group(2)] if given and given.group(2) else []
        config = runpy.run_path(str(ROOT / path))["get_config"](*variant)
        for setting in re.findall(r"--config\.([\w.]+)", line):
            try:
                config_path.get_value(setting, config)
            except KeyError:
                wrong.append((page, line, setting))
    assert not wrong
