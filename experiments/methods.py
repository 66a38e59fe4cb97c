"""Every objective from the same start: its gain for the part that it trains, with intervals.

    python -m experiments methods

Results go to runs/<name>/: methods.csv, table.md, report.html, figures. A cell (objective, regime,
seed) that is finished is not computed again.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from experiments.curves import training_curves
from experiments.lab import Lab, control_scores
from experiments.loading import (
    check_algorithms,
    check_replicates,
    load_data,
    replicates,
    require_known,
    require_some,
    validation_sample,
)
from experiments.rates import chosen_rate, kept_rate, one_by_one
from experiments.reporting import cells, comparison, differences, experiment_figures, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.strategies.regimes import parse
from fedrag_jax.tracking.ledger import Cost

UNTUNED = "none"
METRICS = {
    "retriever": ("recall_at_5", "mrr"),
    "generator": ("em", "f1"),
    "both": ("recall_at_5", "em"),
}
# Vectors cut to a quarter of their dimensions, what the one of these is for and the other not.
CUT = ("in_batch", "matryoshka")


def objective_of(name: str):
    """Returns the `Objective` of a row; the no-op row trains one at learning rate 0."""
    return OBJECTIVES["in_batch" if name == "no_op" else name]


def tuned(lab: Lab, name: str, regime: str, seed: int, split: int, factor: float):
    """Returns `(system, tuner)` after training at the config's learning rates times a factor."""
    objective, rates = objective_of(name), lab.config.learning_rates
    system = lab.system(seed)
    tuner = lab.tuner(lambda task, part: factor * rates[part], regime, seed, split)
    budget = tuner.budget
    tuner = dataclasses.replace(
        tuner,
        folder=tuner.folder / f"{name}-x{factor:g}",
        budget=budget._replace(batch_size=budget.batch_size * objective.batch),
    )
    task = lab.task(name, seed)
    return system.replace(**tuner(task)), tuner


class Methods(Lab):
    """The data and systems of a comparison, and a task of each objective."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tasks = {}

    def task(self, name: str, seed: int):
        """Returns the task of an objective and seed; one object for all rates.

        Retriever objectives share one object over seeds too, so a frozen generator scores once."""
        objective = objective_of(name)
        seed = self.config.seeds[0] if objective.part == "retriever" else seed
        if (name, seed) not in self.tasks:
            self.tasks = {(name, seed): objective.task(self.system(seed), self.dataset)}
        return self.tasks[name, seed]


def validation_score(system, examples, part: str) -> float:
    """Returns the validation score: MRR@10 of a retriever, else the log-likelihood of answers."""
    rows, _ = evaluator.ranking(system.retriever, examples, system.top_k)
    if part == "retriever":
        return float(np.nanmean(evaluator.rank_scores(system.retriever, examples, rows)["mrr"]))
    return -float(evaluator.answer_nll(system, examples, rows[:, : system.top_k]).mean())


def test_scores(system, examples, part: str) -> dict[str, np.ndarray]:
    """Returns the metrics of a part, each [Q]."""
    rows, _ = evaluator.ranking(system.retriever, examples, system.top_k)
    scores = evaluator.rank_scores(system.retriever, examples, rows)
    if part != "generator":
        size = system.retriever.vectors.shape[1]
        cut = system.retriever.cut(size // 4)
        found = evaluator.rank_scores(cut, examples, evaluator.ranking(cut, examples)[0])
        scores["recall_at_5_cut"] = found["recall_at_5"]
    if part != "retriever":
        scores |= evaluator.answers(system, examples, rows[:, : system.top_k])
    return scores


def rate_path(folder: pathlib.Path, name: str, regime: str) -> pathlib.Path:
    """Returns the path of the file with an objective's chosen factor."""
    return folder / "rates" / f"{name}-{regime}.json"


def compute(lab: Methods, point: Point) -> cells.Cell:
    """Trains an objective at the rates with the best validation score; tests it; counts its cost."""
    config, dataset, name, regime = lab.config, lab.dataset, point.name, point.regime
    seed, split = point.seed, point.split
    validation = validation_sample(config, dataset)
    if name == UNTUNED:
        system, tuners, cost = lab.system(seed), [], Cost()
        part = "both"
    else:
        part, factor = objective_of(name).part, 0.0
        if name != "no_op":
            first, what = replicates(config)[0], f"{name}, {regime}"

            def judge(factor):
                system, _ = tuned(lab, name, regime, *first, factor)
                return validation_score(system, validation, part)

            path = rate_path(lab.folder, name, regime)
            factor = chosen_rate(path, config.rate_factors, one_by_one(judge, what), what, [first])
        system, tuner = tuned(lab, name, regime, seed, split, factor)
        tuners, cost = [tuner], sum(tuner.costs.values(), Cost())
    clock = Clock()
    scores = test_scores(system, dataset.test, part)
    cost += Cost.of_evaluation(clock.lap())
    curves = training_curves(tuners)
    controls = {} if part == "retriever" else control_scores(system, lab.control_questions())
    return cells.Cell(
        name, regime, seed, split, scores, controls, [], cost, curves, lab.asked_clusters
    )


ALL = ("no_op", *OBJECTIVES)


def objectives_of(config) -> tuple[str, ...]:
    """Returns the objectives that the config names; all if it names none."""
    return tuple(config.objectives) or ALL


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every objective, regime and metric of its part."""
    rows = []
    for regime, name in itertools.product(config.regimes, objectives_of(config)):
        found, start = (finished(config, folder, n, regime) for n in (name, UNTUNED))
        if not found or not start:
            continue
        objective = objective_of(name)
        for metric in (*METRICS[objective.part], *(["recall_at_5_cut"] if name in CUT else [])):
            path = rate_path(folder, name, regime)
            rows.append(
                {
                    "objective": name,
                    "part": objective.part,
                    "regime": regime,
                    "metric": metric,
                    "before": comparison.estimate(start, metric, "before")["before"],
                    **comparison.estimate(found, metric, "after"),
                    **differences.paired_difference(found, start, metric),
                    "seeds": len(found),
                    "rate_factor": kept_rate(path) if path.exists() else 0.0,
                    **comparison.costs_and_clients(found),
                    **comparison.control_means(found),
                }
            )
    for metric in {row["metric"] for row in rows}:
        differences.adjust([row for row in rows if row["metric"] == metric and "p" in row])
    return rows


COLUMNS = (
    "objective", "part", "regime", "metric", "before", "after", "after_sd", "low", "high",
    "difference", "p", "p_holm", "p_t_holm", "seeds", "closed_book_em", "distractor_em",
    "rate_factor", "seconds", "flops", "tokens", "bytes_up", "bytes_down",
)  # fmt: skip


def verdict(row) -> str:
    """Returns the verdict on a row, from the interval of its difference and Holm's p over the table."""
    if row.get("p_holm") is None or not (row["low"] > 0 or row["high"] < 0):
        return "no difference shown"
    sure = "" if row["p_holm"] < 0.05 else ", not after Holm"
    return ("better" if row["low"] > 0 else "worse") + sure


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    columns = (
        tables.words("objective", "objective"),
        tables.words("part", "part"),
        *([tables.words("regime", "regime")] if len(config.regimes) > 1 else []),
        tables.words("metric", "metric"),
        tables.number("before", "before"),
        tables.number("after", "after"),
        tables.difference("difference [95% CI]"),
        tables.p_value("p", "p_holm"),
        tables.p_value("over seeds", "p_t_holm"),
        tables.Column("", verdict, "left"),
        tables.number("EM, no passage", "closed_book_em"),
        tables.number("EM, a distractor", "distractor_em"),
        tables.Column("rate ×", lambda row: f"{row['rate_factor']:.2g}"),
        tables.number("seconds", "seconds"),
        tables.number("TFLOP", "flops", 2, 1e12),
    )
    t = config.training
    return Report(
        folder.name,
        f"Every objective from the same start: {config.data.name}, {t.rounds} x {t.local_steps} x "
        f"{config.federated.clients} steps of {t.batch_size} examples (large_batch: 16 times as many).",
        [
            Section(
                "Figure",
                "differences",
                "Gain of each objective for the part it trains, with 95% intervals over seeds "
                "and questions.",
                figure=experiment_figures.differences(
                    [row for row in rows if row["metric"] in ("recall_at_5", "em")]
                ),
            ),
            Section(
                "Objectives",
                "objectives",
                "Scores in percent, means over seeds. Differences from the untuned system are "
                "paired by question and seed, with 95% intervals over questions and seeds; p by "
                "permutation over questions, Holm-adjusted over each metric. Learning rates were "
                "chosen for every objective on validation questions, with the first seed. The "
                "no-op trains at a rate of 0. recall_at_5_cut: for vectors truncated to the "
                "first quarter of their dimensions. Controls for objectives that train the "
                "generator: EM without a passage, and with a distractor.",
                tables.Table(columns, rows),
            ),
        ],
        {"methods.csv": rows},
        {"methods.csv": COLUMNS},
    )


def check(config, dataset) -> list[str]:
    """Returns the objectives that the training questions allow; prints a note on the others.

    Raises:
      ConfigError: an unknown objective or a list that is empty; none is left.
    """
    check_replicates(config)
    check_algorithms(config)
    require_some(config, "regimes", "rate_factors")
    asked = objectives_of(config)
    require_known("config.objectives", asked, ALL)
    for regime in config.regimes:
        if parse(regime, config.federated.alpha)[0] == "local":
            raise ConfigError("config.regimes: objectives are compared centralised and federated")
    bare = sum(not e.positive_ids for e in dataset.train)
    left = [name for name in asked if not (bare and objective_of(name).labels)]
    if len(left) < len(asked):
        out = ", ".join(name for name in asked if name not in left)
        print(
            f"{out} left out: needs gold passages, {bare} training questions have none", flush=True
        )
    if not left:
        raise ConfigError("config.objectives: none is left; add some that need no gold passages")
    return left


def lab(config, folder: pathlib.Path) -> Methods:
    """Returns the lab with the data and models of the config, and the objectives that the data allows.

    Raises:
      ConfigError: as `check`.
    """
    dataset = load_data(config)
    objectives = check(config, dataset)
    found = Methods(config, dataset, folder)
    found.objectives = objectives
    return found


def points(lab: Methods) -> list[Point]:
    """Regime by regime, the untuned system first."""
    names = (UNTUNED, *lab.objectives)
    return [
        Point(name, regime, *pair)
        for regime, name, pair in itertools.product(
            lab.config.regimes, names, replicates(lab.config)
        )
    ]


def summary(cell) -> str:
    """The means of a cell's scores, for people."""
    return "  ".join(f"{name} {100 * np.nanmean(x):.1f}" for name, x in cell.scores.items())


EXPERIMENT = Experiment(
    name="methods",
    free=("seeds", "split_seeds", "objectives", "regimes"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
