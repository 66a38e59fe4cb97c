"""Federated fine-tuning over kinds of federation: skew, clients, local steps, participation.

    python -m experiments heterogeneity

Results go to runs/<name>/: heterogeneity.csv, table.md, report.html, figures. A point (values of all
factors) has a folder of its own below points/; what is finished there is not computed again.
"""

import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.lab import Lab, compute_cell
from experiments.loading import (
    check,
    load_data,
    replicates,
    require_federated,
    trainable_strategies,
    validation_sample,
    warn_of_borrowed_rates,
)
from experiments.rates import chosen_rate, one_by_one
from experiments.reporting import cells, comparison, differences, figures, tables
from experiments.reporting.comparison import METRICS
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.strategies.regimes import Budget, parse

NAMES = {
    "alpha": "Dirichlet α of the split",
    "clients": "clients",
    "local_steps": "local steps",
    "participation": "share of clients in a round",
}
WHERE = {
    "alpha": ("federated", "alpha"),
    "clients": ("federated", "clients"),
    "local_steps": ("training", "local_steps"),
    "participation": ("federated", "participation"),
}


def values(config) -> list[tuple[str, float]]:
    """Returns (factor, value) of every point by value; the config's own value is included."""
    found = []
    for factor, (room, name) in WHERE.items():
        if others := config.factors[factor]:
            found += [(factor, value) for value in sorted({*others, config[room][name]})]
    return found


def at_point(config, factor: str, value: float):
    """Returns the config with one value changed and the same number of training examples.

    Rounds follow from that. Learning rates are those chosen for an alpha where there are such; they
    fall linearly, and are scaled so that their mean over the rounds does not depend on how many.

    Raises:
      ConfigError: a value that is none of the factor's, or leaves no whole number of rounds.
    """
    changed, (room, name) = config.copy_and_resolve_references(), WHERE[factor]
    whole = isinstance(config[room][name], int)
    if whole and (value != int(value) or value < 1):
        raise ConfigError(f"config.factors.{factor} must be whole and at least 1, got {value:g}")
    changed[room][name] = int(value) if whole else float(value)

    def steps(c):
        return c.federated.clients * c.training.local_steps

    work = config.training.rounds * steps(config)
    if work % steps(changed):
        raise ConfigError(
            f"config.factors.{factor}: {value:g} leaves {work / steps(changed):g} rounds; clients x "
            f"local_steps must divide {work}"
        )
    changed.training.rounds = work // steps(changed)
    check(changed)
    rates = config.learning_rates.get(f"federated_{changed.federated.alpha:g}")
    rates = rates if rates and factor == "alpha" else config.learning_rates.federated
    more = mean_share(schedule(config).rounds) / mean_share(schedule(changed).rounds)
    for part in rates:
        changed.learning_rates.federated[part] = rates[part] * more
    return changed


def mean_share(rounds: int) -> float:
    """Returns the mean learning rate over all rounds, as a fraction of the first round's."""
    return (rounds + 1) / (2 * rounds)


def schedule(config):
    """Rounds and refreshes of a point."""
    t, f = config.training, config.federated
    return Budget(t.rounds, t.local_steps, f.clients, participation=f.participation).schedule(
        "federated"
    )


def place(config) -> str:
    """Returns the folder of a point, below that of the run."""
    f = config.federated
    steps, rounds = config.training.local_steps, config.training.rounds
    return (
        f"points/alpha{f.alpha:g}-clients{f.clients}-steps{steps}x{rounds}-part{f.participation:g}"
    )


def scaled(run: Lab, factor: float) -> Lab:
    """Returns the same point with all learning rates multiplied by a factor."""
    config = run.config.copy_and_resolve_references()
    for part in config.learning_rates.federated:
        config.learning_rates.federated[part] *= factor
    return run.like(config, run.folder / f"rates-x{factor:g}")


def at_best_rates(run: Lab, strategy: str) -> Lab:
    """Returns the point at the rates with the best validation score of a strategy, over two seeds.

    By MRR where the retriever is tuned with labels, else by F1, which is less noisy than EM.
    """
    examples = validation_sample(run.config, run.dataset)
    ranked = strategy == "retriever" and any(e.positive_ids for e in examples)

    def score(factor, pair):
        (system,), _ = scaled(run, factor).tuned_systems(strategy, "federated", *pair)
        if not ranked:
            return np.mean(evaluator.evaluate(system, examples)["f1"])
        rows, _ = system.retriever.search([e.question for e in examples], evaluator.RANKED)
        return np.nanmean(evaluator.rank_scores(system.retriever, examples, rows)["mrr"])

    pairs = replicates(run.config)[:2]

    def judge(factor):
        return float(np.mean([score(factor, pair) for pair in pairs]))

    path = run.folder / f"rates-{strategy}.json"
    what = f"{strategy}, {run.folder.name}"
    judged = one_by_one(judge, what)
    return scaled(run, chosen_rate(path, run.config.rate_factors, judged, what, pairs))


def finished_at(config, folder: pathlib.Path, strategy: str) -> list:
    """Returns the finished cells of a strategy at a point; all points share the untuned cells."""
    here = folder if strategy == "none" else folder / place(config)
    return finished(config, here, strategy, "federated")


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every point and strategy, with its difference from the config's point."""
    rows, margin = [], config.equivalence_margin
    for factor, value in values(config):
        here, (room, name) = at_point(config, factor, value), WHERE[factor]
        for strategy in config.strategies:
            if not (cells := finished_at(here, folder, strategy)):
                continue
            regime = parse("federated", here.federated.alpha)
            (row,) = comparison.strategy_rows(cells, {"federated": regime})
            row |= {"factor": factor, "value": value}
            if strategy != "none":
                row["rounds"] = schedule(here).rounds
                row["examples"] = float(
                    np.mean([curve[-1]["examples"] for c in cells for curve in c.curves.values()])
                )
                if value != config[room][name]:
                    usual = finished_at(config, folder, strategy)
                    for metric in comparison.METRICS:
                        row |= differences.paired_difference(
                            cells, usual, metric, margin=margin, prefix=f"{metric}_by_"
                        )
            rows.append(row)
    for metric in comparison.METRICS:
        differences.adjust(rows, f"{metric}_by_")
    return rows


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    first = ("factor", "value", "strategy", "seeds", "em", "em_low", "em_high")

    who = (
        tables.words("factor", "factor"),
        tables.Column("value", lambda row: f"{row['value']:g}".replace("inf", "∞")),
        tables.words("strategy", "strategy"),
    )
    quality = (
        tables.number("seeds", "seeds", 0),
        tables.interval("EM [95% CI]", "em"),
        tables.interval("Recall@5 [95% CI]", "recall_at_5"),
        tables.number("worst client", "client_em_worst"),
    )
    against = (
        column
        for metric, title in METRICS.items()
        for column in (
            tables.difference(f"{title} [95% CI]", f"{metric}_by_"),
            tables.p_value("p", f"{metric}_by_p_holm"),
            tables.p_value("over seeds", f"{metric}_by_p_t_holm"),
            tables.p_value("equivalent", f"{metric}_by_p_e_holm"),
        )
    )
    costs = (
        tables.number("rounds", "rounds", 0),
        tables.number("refreshes", "refreshes", 0),
        tables.number("examples", "examples", 0),
        tables.number("seconds", "seconds"),
        tables.number("of aggregation", "aggregate_seconds", 2),
        tables.number("peak MB", "peak_bytes", 0, 1e6),
        tables.number("MB up", "bytes_up", 1, 1e6),
        tables.number("MB down", "bytes_down", 1, 1e6),
    )
    f, t = config.federated, config.training
    usual = (
        f"α = {f.alpha:g}, {f.clients} clients, {t.rounds} rounds of {t.local_steps} local steps, "
        f"{100 * f.participation:g}% of the clients in each"
    )
    untuned = next(
        (f" Untuned, EM is {row['em']:.1f}." for row in rows if row["strategy"] == "none"), ""
    )
    tuned = [row for row in rows if row["strategy"] != "none"]
    open_marks = {factor: config[room][name] for factor, (room, name) in WHERE.items()}
    return Report(
        folder.name,
        f"Federated fine-tuning on {config.data.name}, one factor varied at a time around "
        f"{usual}. Every point has the same number of local steps with the same number of "
        "examples, except for clients that hold fewer than a batch.",
        [
            Section(
                "Figure",
                "heterogeneity",
                "Exact match with its 95% interval over seeds and test questions. The dotted line is "
                "the untuned system; the open mark is the default point.",
                figure=figures.over_factors(rows, NAMES, open_marks),
            ),
            Section(
                "Quality",
                "points",
                "Metrics in percent with 95% intervals over seeds and questions. Learning rates "
                "were searched on validation questions at every point, with the first two seeds. "
                "The worst client is measured on one set of client mixtures for all points, "
                f"those of the default point's split.{untuned}",
                tables.Table((*who, *quality), tuned),
            ),
            Section(
                "Differences from the default point",
                "differences",
                "Differences in points from the default point, paired by question and seed; p "
                "over questions, over seeds (from five on), and of equivalence within "
                f"{config.equivalence_margin:g} points, Holm-adjusted for each metric.",
                tables.Table((*who, *against), [row for row in tuned if "em_by_difference" in row]),
            ),
            Section(
                "Costs",
                "costs",
                "Refreshes occur in strategies that retrieve during training: one per round, and "
                "fewer if a round samples few clients.",
                tables.Table((*who, *costs), tuned),
            ),
        ],
        {"heterogeneity.csv": rows},
        {"heterogeneity.csv": first},
    )


class Factors(NamedTuple):
    """The shared parts of all cells.

    Attributes:
      whole: a lab at the usual point, for what is not trained.
      at: a lab for each point, by its place.
    """

    config: Any
    folder: pathlib.Path
    dataset: Dataset
    whole: Lab
    at: dict[str, Lab]


def lab(config, folder: pathlib.Path) -> Factors:
    """Returns the data and models of the config, with a lab for each of its points.

    Raises:
      ConfigError: as `loading.check` and `at_point`.
    """
    check(config)
    require_federated(config, "the factors are settings of federated training")
    if not config.rate_factors or min(config.rate_factors) <= 0:
        raise ConfigError(f"config.rate_factors must be positive, got {config.rate_factors}")
    configs = {place(c): c for c in (at_point(config, *value) for value in values(config))}
    if not configs:
        raise ConfigError("config.factors: all are empty; give some values to one of them")
    dataset = load_data(config)
    warn_of_borrowed_rates(config)
    whole = Lab(config, dataset, folder)
    at = {where: whole.like(c, folder / where) for where, c in configs.items()}
    for there, (_, split) in itertools.product(at.values(), replicates(config)):
        there.clients("federated", split)  # refuses what cannot be split
    return Factors(config, folder, dataset, whole, at)


def points(lab: Factors) -> list[Point]:
    """Returns all cells: the untuned system first, then by point and strategy."""
    strategies, pairs = trainable_strategies(lab.config, lab.dataset), replicates(lab.config)
    found = [Point("none", "federated", *pair) for pair in pairs if "none" in strategies]
    tuned = [strategy for strategy in strategies if strategy != "none"]
    for (where, there), strategy, pair in itertools.product(lab.at.items(), tuned, pairs):
        about = {factor: there.config[room][name] for factor, (room, name) in WHERE.items()}
        found.append(Point(strategy, "federated", *pair, about, where))
    return found


def compute(lab: Factors, point: Point) -> cells.Cell:
    """Trains and tests a strategy at a point, at the best learning rates there."""
    there = at_best_rates(lab.at[point.folder], point.name) if point.folder else lab.whole
    where = point.name, point.regime, point.seed, point.split
    return compute_cell(there, *where, controls=False)


def summary(cell: cells.Cell) -> str:
    """Returns a line with a cell's metrics."""
    return f"EM {100 * np.nanmean(cell.scores['em']):.1f}"


EXPERIMENT = Experiment(
    name="heterogeneity",
    free=(
        "seeds", "split_seeds", "strategies", "factors", "search_seconds", "equivalence_margin",
    ),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)  # fmt: skip
