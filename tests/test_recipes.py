"""The first four recipes of CONTRIBUTING.md, each followed with a toy in a copy of the code."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # each runs programs of its own
TOYS = ROOT / "tests" / "recipes"
CODE = "fedrag_jax", "experiments", "configs"


@pytest.fixture
def copy(tmp_path):
    """A copy of what the recipes change."""
    for name in CODE:
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    return tmp_path


def add_row(path: pathlib.Path, after: str, row: str) -> None:
    """Puts a row behind a line that is there once."""
    text = path.read_text()
    assert text.count(after) == 1, f"{path} has {text.count(after)} lines {after!r}"
    path.write_text(text.replace(after, after + row))


def changed(copy: pathlib.Path) -> set[str]:
    """Files that differ from those of the checkout, or are not there."""
    found = set()
    for path in (path for name in CODE for path in (copy / name).rglob("*.py")):
        name = path.relative_to(copy)
        old = ROOT / name
        if not old.exists() or old.read_bytes() != path.read_bytes():
            found.add(str(name))
    return found


def run(copy: pathlib.Path, *command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], cwd=copy, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


TRAINS = """
import dataclasses, jax, numpy as np, optax
from fedrag_jax import RAGSystem, evaluate, fit, partition, dirichlet
from fedrag_jax.data import synthetic
from fedrag_jax.federated.algorithms.by_name import Named
from fedrag_jax.strategies.own import named
world = synthetic.generate()
world = dataclasses.replace(world, train=world.train[:32], test=world.test[:40])
system = RAGSystem.build(world.passages, world.train)
clients = partition(world.train, dirichlet(1.0, clients=2))
def tune(task):
    averaging = Named({algorithm!r}).averaging(task, {{}})
    how = {{"rounds": 2, "batch_size": 4, "optimizer": optax.adam(3e-4)}}
    return fit(task, clients, averaging(local_steps=2), **how).trainable
row = named({strategy!r})
tuned = row(system, world, tune)
after, before = (jax.tree.leaves(s.retriever.query) for s in (tuned, system))
assert max(abs(a - b).max() for a, b in zip(after, before)) > 0
mrr = [np.mean(evaluate(s, world.test)["mrr"]) for s in (system, tuned)]
print(row.needs_gold, mrr[1] > mrr[0])
"""


def test_an_objective_is_two_files_of_code(copy):
    shutil.copy(TOYS / "drawn.py", copy / "fedrag_jax/objectives/drawn.py")
    rows = copy / "fedrag_jax/strategies/objectives.py"
    add_row(rows, "from fedrag_jax.objectives.distillation import distillation, distilled\n",
            "from fedrag_jax.objectives.drawn import drawn\n")  # fmt: skip
    add_row(rows, '    "in_batch": _ranking(),\n',
            '    "drawn": Objective(\n'
            '        "retriever", lambda s, d: drawn(s.retriever, d), labels=True\n'
            '    ),\n')  # fmt: skip
    assert changed(copy) == {
        "fedrag_jax/objectives/drawn.py",
        "fedrag_jax/strategies/objectives.py",
    }
    assert run(copy, "-c", TRAINS.format(algorithm="fedavg", strategy="drawn")) == "True True\n"


def test_an_algorithm_is_two_files_of_code(copy):
    shutil.copy(TOYS / "half.py", copy / "fedrag_jax/federated/algorithms/half.py")
    rows = copy / "fedrag_jax/federated/algorithms/by_name.py"
    add_row(rows, "from fedrag_jax.federated.algorithms.fed_prox import fed_prox\n",
            "from fedrag_jax.federated.algorithms.half import half\n")  # fmt: skip
    add_row(rows, '    "fedprox": fed_prox,\n', '    "half": half,\n')
    assert changed(copy) == {
        "fedrag_jax/federated/algorithms/half.py",
        "fedrag_jax/federated/algorithms/by_name.py",
    }
    assert run(copy, "-c", TRAINS.format(algorithm="half", strategy="retriever")) == "True True\n"
    named = (
        "from fedrag_jax.federated.algorithms.by_name import ALGORITHMS, options_of\n"
        "print(ALGORITHMS['half'](share=0.25, local_steps=3).name, options_of('half')['share'])"
    )
    assert run(copy, "-c", named).startswith("half(share=0.25, local_steps=3, ")


def test_a_store_is_two_files_of_code(copy):
    shutil.copy(TOYS / "last_word.py", copy / "fedrag_jax/retrieval/stores/last_word.py")
    add_row(
        copy / "fedrag_jax/retrieval/stores/registry.py",
        "KINDS = {\n",
        '    "last_word": Kind(\n'
        '        "the last word", "last_word", "last_word:LastWord", lambda store, d: store()\n'
        "    ),\n",
    )
    assert changed(copy) == {
        "fedrag_jax/retrieval/stores/last_word.py",
        "fedrag_jax/retrieval/stores/registry.py",
    }
    opened = (
        "from fedrag_jax.retrieval.stores.registry import new_store, open_store\n"
        "new_store('last_word', 8).save('saved')\n"
        "print(open_store('saved').search(['Who was Ada'])[0][0].passage.text)\n"
    )
    assert run(copy, "-c", opened) == "Ada\n"
    shown = "from fedrag_jax.cli.command_line import main; main(['index', '-h'])"
    assert "last_word: the last word" in " ".join(run(copy, "-c", shown).split())


def test_an_experiment_is_three_files(copy):
    shutil.copy(TOYS / "depths.py", copy / "experiments/depths.py")
    shutil.copy(TOYS / "depths_config.py", copy / "configs/depths.py")
    add_row(copy / "experiments/__main__.py", "COMMANDS = {\n", '    "depths": "depths",\n')
    assert changed(copy) == {
        "experiments/depths.py", "configs/depths.py", "experiments/__main__.py",
    }  # fmt: skip
    out = run(copy, "-m", "experiments", "depths", "--config.depths=(1,)")
    assert "[1/1] depth1, here, seed0: 0." in out
    out = run(copy, "-m", "experiments", "depths")  # what is there is not computed again
    assert "[2/2] depth5, here, seed0: 0." in out and "[1/2]" not in out
    assert len((copy / "runs/depths/depths.csv").read_text().splitlines()) == 3
    assert "Depths" in (copy / "runs/depths/report.html").read_text()
    assert "report.html" in run(copy, "-m", "experiments.report", "runs/depths")
