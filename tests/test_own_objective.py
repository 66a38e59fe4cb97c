"""The objective of the docs goes down every road that trains; what it costs is empty, not an error."""

import ast
import csv
import dataclasses
import json
import pathlib
import textwrap

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from small import own_folder, small
from toys import EXAMPLES, FOUR, linear_task

from experiments import compare_strategies, lab, loading
from experiments.reporting import cells, comparison_tables, figures
from experiments.reporting.comparison import own as on_own
from experiments.reporting.comparison import own_weight, strategy_rows
from experiments.reporting.differences import independent_rows
from experiments.run import run
from fedrag_jax.cli.command_line import main
from fedrag_jax.data import datasets
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.objectives.task import StepCost, Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies import own
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import Budget, parse
from fedrag_jax.strategies.strategies import STRATEGIES
from fedrag_jax.systems import training
from fedrag_jax.tracking.ledger import Cost, mean_cost, training_cost

ROOT = pathlib.Path(__file__).parent.parent
NAME = "own_hinge:hinge_task"


def hinge_module() -> str:
    """A module of a user's, with the loss and the task of the first example of one's own."""
    page = (ROOT / "docs" / "objectives.md").read_text().partition("## Your own")[2]
    block = page.split("```python\n")[1].split("```")[0]
    tree = ast.parse(block)
    of = {getattr(n, "name", None) or ast.unparse(n.targets[0]): ast.get_source_segment(block, n)
          for n in tree.body if isinstance(n, (ast.FunctionDef, ast.Assign))}  # fmt: skip
    body = [of["hinge"], of["ranking"].replace("world", "dataset"), of["task"], "return task"]
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    made = "def hinge_task(system, dataset):\n    retriever = system.retriever\n"
    return "\n".join(imports) + "\n\n\n" + made + textwrap.indent("\n".join(body), "    ") + "\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "own_hinge.py").write_text(hinge_module())
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty labelled questions and their passages."""
    return pathlib.Path(own_folder(tmp_path_factory.mktemp("data"), labelled=True))


@pytest.fixture(scope="module")
def dataset(folder):
    return datasets.load(str(folder))


@pytest.fixture(scope="module")
def system(dataset):
    return RAGSystem.build(dataset.passages, dataset.train)


def hinge_config(folder):
    config = small()
    config.data.name, config.federated.column = str(folder), "hops"
    config.federated.alpha, config.training.rounds = float("inf"), 2
    config.strategies, config.regimes = ("none", "retriever", NAME), ("federated",)
    config.learning_rates.federated[NAME] = 2e-3
    loading.check(config)
    return config


def moved(before, after) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_it_is_fitted_and_swept(written, system, dataset):
    from own_hinge import hinge_task

    task = hinge_task(system, dataset)
    one = {"task": task, "data": dataset.train, "algorithm": None, "rounds": 2}
    alone, found = fit(**one), sweep([one, one | {"seed": 1}])
    assert alone.history[-1]["loss"] < alone.history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, found[0].trainable, alone.trainable)
    assert moved(found[0].trainable, found[1].trainable)
    cost = training_cost(task, alone.history, task.table(dataset.train[:1]), steps=20, batch_size=8)
    assert (cost.flops, cost.flops_compiler, cost.tokens) == (None, None, None)
    assert cost.seconds > 0 and cost.peak_bytes > 0


def test_an_experiment_trains_and_reports_it(written, folder, tmp_path):
    config = hinge_config(folder)
    run = lab.Lab(config, loading.load_data(config), tmp_path / "run")
    found = {}
    for name in config.strategies:
        cell = lab.compute_cell(run, name, "federated", 0, 0, controls=False)
        cells.save(run.folder, cell)
        found[name] = cells.load(run.folder, name, "federated", 0, 0)
    own_cell, ranking = found[NAME], found["retriever"]
    ((tuned,), (tuner,)) = run.tuned_systems(NAME, "federated", 0, 0)
    assert moved(run.system(0).retriever.query, tuned.retriever.query)
    assert tuner.costs.keys() == own_cell.curves.keys() == {NAME}
    assert run.rate("federated", own.named(NAME), "query") == 2e-3
    assert (own_cell.cost.flops, own_cell.cost.tokens) == (None, None)
    assert own_cell.cost.bytes_up == ranking.cost.bytes_up > 0
    assert ranking.cost.flops > 0 and ranking.cost.tokens > 0

    report = compare_strategies.EXPERIMENT.report(config, run.folder)
    rows = {row["strategy"]: row for row in report.rows["strategies.csv"]}
    empty = {name for name, value in rows[NAME].items() if value is None}
    assert {"flops", "flops_compiler", "tokens", "labels"} <= empty
    assert float(rows[NAME]["seconds"]) > 0 and float(rows["retriever"]["tokens"]) > 0
    drawn = {s.name: s.figure for s in report.sections if s.figure is not None}
    titles = [ax.get_title() for ax in drawn["learning_curves"].axes if ax.get_visible()]
    assert titles == ["retriever: ranking", NAME]
    labels = [text.get_text() for text in drawn["quality_cost"].legends[0].get_texts()]
    assert NAME in labels
    assert f"| {NAME}" in report.markdown()
    plt.close("all")


@pytest.mark.slow
def test_the_whole_comparison_runs_with_it(written, folder, tmp_path):
    config = hinge_config(folder)
    config.strategies, config.regimes = ("none", "independent", NAME), ("federated", "local")
    done = run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    with open(done / "against_independent.csv", newline="") as file:
        (row, _) = csv.DictReader(file)
    assert row["strategy"] == NAME and float(row["seconds_ratio"]) > 0
    assert not row.get("flops_ratio")


def test_the_command_line_trains_it(written, system, dataset, tmp_path, capsys):
    system.save(tmp_path / "system")
    with open(tmp_path / "own.jsonl", "w") as file:
        for example in [*dataset.train, *dataset.validation]:
            file.write(json.dumps(dataclasses.asdict(example)) + "\n")
    command = [
        "train", str(tmp_path / "system"), str(tmp_path / "own.jsonl"), "--to", str(tmp_path / "tuned"),
        "--strategy", NAME, "--regime", "federated", "--clients", "2", "--rounds", "2",
        "--factors", "1", "--query-rate", "1e-3", "--json",
    ]  # fmt: skip
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["best_factor"] == 1
    tuned = RAGSystem.load(tmp_path / "tuned")
    assert moved(system.retriever.query, tuned.retriever.query)
    assert not moved(system.adapters, tuned.adapters)


def test_the_example_of_the_docs_is_one_program_for_all(tmp_path, monkeypatch, system, dataset):
    page = (ROOT / "docs" / "objectives.md").read_text()
    (block,) = [b for b in page.split("```python\n")[1:] if b.startswith("# my_objectives.py")]
    (tmp_path / "my_objectives.py").write_text(block.split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    tuned = own.named("my_objectives:hinge")
    one, other = (next(tuned.tasks(s, dataset)) for s in (system, dataclasses.replace(system)))
    assert one.loss == other.loss and hash(one.loss) == hash(other.loss)
    history = fit(one, dataset.train, rounds=2).history
    assert history[-1]["loss"] < history[0]["loss"]


# --- strategies of one's own ---------------------------------------------------------------------


def test_what_a_name_may_be(written, tmp_path, system, dataset):
    (tmp_path / "other_own.py").write_text(
        "from fedrag_jax.strategies.objectives import OBJECTIVES\n"
        "from fedrag_jax.strategies.strategies import joint_token as several\n"
        "objective = OBJECTIVES['oracle']\n"
        "number = 3\n"
        "def nothing(system, dataset): return None\n"
        "def elsewhere(system, dataset):\n"
        "    import dataclasses\n"
        "    task = objective.task(system, dataset)\n"
        "    return dataclasses.replace(task, trainable={'weights': task.trainable['adapters']})\n"
    )
    assert own.named("retriever") is STRATEGIES["retriever"]
    assert own.named("other_own:several") is STRATEGIES["joint_token"]
    alone = own.named("oracle")
    assert (alone.name, alone.needs_gold) == ("oracle", True)
    assert alone.rates == {"adapters": "generator"}
    assert {*own.named("pdist").rates.values()} == {"retriever"}
    assert {*own.named("rag_token").rates.values()} == {"retriever", "generator"}
    (task,) = [next(alone.tasks(system, dataset))]
    assert task.trainable.keys() == {"adapters"} and task.name == "oracle"
    assert own.named("lsr") is STRATEGIES["lsr"]  # a strategy comes before an objective of its name
    with pytest.raises(ConfigError, match="unknown strategy 'large_batch'"):
        own.named("large_batch")
    (task,) = [next(own.named("other_own:objective").tasks(system, dataset))]
    assert own.named("other_own:objective").needs_gold
    assert task.trainable.keys() == {"adapters"} and task.name == "other_own:objective"
    for name, words in (
        (
            "poem",
            r"unknown strategy 'poem'; choose among \['none'.*'in_batch'.*your own as module:name",
        ),
        (
            "no_such:thing",
            r"'no_such:thing' cannot be imported \(No module named 'no_such'\).*PYTHONP",
        ),
        ("other_own:thing", r"cannot be imported \(module 'other_own' has no attribute 'thing'\)"),
        (":thing", "':thing' cannot be imported"),
        ("other_own:number", r"is 3; it must be a function \(system, dataset\) -> Task"),
    ):
        with pytest.raises(ConfigError, match=words):
            own.named(name)
    for name, words in (
        ("nothing", "which is not a Task"),
        ("elsewhere", r"trains \['weights'\], wh"),
    ):
        with pytest.raises(ConfigError, match=words):
            own.named(f"other_own:{name}")(system, dataset, lambda task: task.trainable)
    config = small()
    config.strategies = ("none", "no_such:thing")
    with pytest.raises(ConfigError, match=r"config\.strategies: strategy 'no_such:thing' cannot"):
        loading.check(config)


def train(system, dataset, folder, strategy, rates):
    clients = training.split(dataset.train, "centralised", 1, 1.0, 0)
    how = {"regime": "centralised", "budget": Budget(1, 1, 1, 4), "factors": (1.0,)}
    return training.train(
        system, dataset, folder, strategy=strategy, clients=clients, rates=rates, **how
    )


@pytest.mark.parametrize("part", ["head", "document"])
def test_parts_that_the_command_line_does_not_tune_are_refused(part, system, dataset, tmp_path):
    rates, words = {"query": 0.1, "adapters": 0.1}, rf"trains '{part}', and only \['query'"
    with pytest.raises(ConfigError, match=rf"'own_task' {words}"):
        training._rate(rates, 1.0, "own_task", part)
    with pytest.raises(ConfigError, match=rf"'retriever' {words}"):  # before it trains what is lost
        train(system, dataset, tmp_path / "x", "retriever", rates | {part: 0.1})
    assert not (tmp_path / "x").exists()


SEARCHER = """
import dataclasses
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.strategy import strategy


@strategy(mode="search", rates={"adapters": "generator"})
def searcher(system, dataset):
    searching = system.searching._replace(passages=3)
    system = dataclasses.replace(system, searching=searching)
    return system.replace(**(yield OBJECTIVES["concatenated"].task(system, dataset)))
"""


def test_a_strategy_that_searches_is_judged_and_kept_so(system, dataset, tmp_path, monkeypatch):
    (tmp_path / "own_searcher.py").write_text(SEARCHER)
    monkeypatch.syspath_prepend(tmp_path)
    name, modes = "own_searcher:searcher", []
    few = dataclasses.replace(
        dataset, train=dataset.train[:8], validation=dataset.validation[:4], test=dataset.test[:4]
    )

    def judged(system, examples, mode):
        modes.append(mode)
        return evaluate(system, examples, mode=mode)

    monkeypatch.setattr(training, "evaluate", judged)
    found = train(system, few, tmp_path / "t", name, {"adapters": 1e-3})
    assert modes == ["search"] * 4, "validation and test, before and after"
    assert found.system.searching == system.searching._replace(passages=3)
    after = evaluate(found.system, few.test, mode="search")
    assert found.test["after"]["f1"] == after["f1"].mean()
    config = small()
    for mode, own_mode in (("concatenated", "search"), ("", "")):
        config.mode = mode
        assert lab.own_mode(config, name) == own_mode and lab.own_mode(config, "retriever") == mode


# --- costs that are declared ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_declares_its_cost(name, system, dataset):
    task = OBJECTIVES[name].task(system, dataset)
    assert task.declared is task.cost
    table = task.table(dataset.train[:2])
    nothing_moves = name == "head"  # whose matrix is not counted
    assert (task.declared.flops(task, table) > 0) != nothing_moves
    table["weight"] = np.ones(2, np.float32)
    _, told = jax.eval_shape(task.loss, task.trainable, task.frozen, table, jax.random.key(0))
    assert task.declared.tokens in told


def test_a_cost_is_that_of_its_loss(system, dataset):
    task = OBJECTIVES["in_batch"].task(system, dataset)
    other = dataclasses.replace(task, loss=lambda *_: (0.0, {}))
    assert other.declared == StepCost(other.loss)
    renamed = dataclasses.replace(task, name="other")
    assert renamed.declared is task.cost


def test_a_cost_of_ones_own():
    task = linear_task()
    cost = StepCost(task.loss, flops=lambda task, table: 2 * table["x"].shape[1], tokens="id")
    task = dataclasses.replace(task, cost=cost)
    history = fit(task, FOUR, fed_avg(local_steps=1), rounds=2, batch_size=2).history
    table = task.table(EXAMPLES[:1])
    found = training_cost(task, history, table, steps=8, batch_size=2)
    assert found.flops == 8 * 2 * 2 * 3 and found.flops_compiler is None
    read = [r["metrics"]["id"] for r in history]
    first, last = (r["examples"] for r in history)
    assert found.tokens == pytest.approx(first * read[0] + (last - first) * read[1])
    unknown = dataclasses.replace(task, cost=cost._replace(tokens="words"))
    with pytest.raises(ConfigError, match=r"'linear' declares that its metric 'words' .* \['id'\]"):
        training_cost(unknown, history, table, steps=8, batch_size=2)


def test_what_is_not_known_stays_so_in_sums_and_tables():
    one, other = Cost(seconds=1.0, flops=3.0, tokens=2.0), Cost(seconds=2.0, flops=None, tokens=4.0)
    both, mean = one + other, mean_cost([one, other])
    assert (both.seconds, both.flops, both.tokens) == (3.0, None, 6.0)
    assert (mean.seconds, mean.flops, mean.tokens) == (1.5, None, 3.0)
    metrics = ("em", "f1", "recall_at_5", "mrr")
    scores = {m: np.array([0.0, 1.0]) for m in (*metrics, *map(on_own, metrics))}
    scores |= {own_weight(on_own(m)): np.ones(2) for m in metrics}

    def cell(name, cost):
        return cells.Cell(name, "federated", 0, 0, scores, {}, [], cost, {}, np.arange(2))

    both = [cell("independent", one), cell("mine:own", other)]
    (row,) = independent_rows(both, 2.0)
    assert row["seconds_ratio"] == 2 and "flops_ratio" not in row
    last = comparison_tables.independent_table([row]).markdown().splitlines()[-1]
    assert last.rstrip(" |").endswith("–")
    rows = strategy_rows(both, {"federated": parse("federated", 1.0)})
    assert [r["labels"] for r in rows] == ["yes", None]
    assert comparison_tables.costs_table(rows).markdown().splitlines()[-1].count("–") == 1


def test_every_curve_is_drawn():
    def rounds(loss):
        return [{"round": 1, "loss": loss, "metrics": {}, "examples": 8, "seconds": 1.0}]

    curves = {"mine:own": rounds(2.0), "rag_token_query": rounds(3.0), "another": rounds(1.0)}
    cell = cells.Cell("mine:own", "federated", 0, 0, {}, {}, [], Cost(), curves, np.arange(0))
    cell = cell._replace(labels={"rag_token_query": "RAG-Token: retriever"})
    figure = figures.learning_curves([cell])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["mine:own", "RAG-Token: retriever", "another"]
    plt.close("all")


def test_a_task_needs_no_cost():
    assert Task("bare", {}, {}, print, list).declared == StepCost(print)
