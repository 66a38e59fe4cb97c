"""Federated fine-tuning over kinds of federation: skew, clients, local steps, participation.

    python -m experiments.heterogeneity --config=configs/heterogeneity.py

Results go to runs/<name>/: heterogeneity.csv, table.md, report.html, figures. A point (values of all
factors) has a folder of its own below points/; what is finished there is not computed again.
"""

import itertools
import math
import pathlib
import time

import numpy as np

from experiments.cell_by_cell import finished, write_report
from experiments.comparison import Comparison, compute_cell
from experiments.inputs import (
    check,
    load_data,
    replicates,
    trainable_strategies,
    validation_sample,
    warn_of_borrowed_rates,
)
from experiments.launch import launch, settled_config
from experiments.rates import chosen_rate, kept_rate, one_by_one
from fedrag_jax.errors import ConfigError, DivergenceError

NAMES = {
    "alpha": "Dirichlet α of the split",
    "clients": "clients",
    "local_steps": "local steps",
    "participation": "share of clients in a round",
}
# What may differ between calls whose points lie side by side.
FREE = (
    "seeds", "split_seeds", "strategies", "factors", "search_seconds", "equivalence_margin", "wandb"
)  # fmt: skip
WHERE = {
    "alpha": ("federated", "alpha"),
    "clients": ("federated", "clients"),
    "local_steps": ("training", "local_steps"),
    "participation": ("federated", "participation"),
}


def points(config) -> list[tuple[str, float]]:
    """(factor, value) of every point, in order of value, that of the rest of the config included."""
    found = []
    for factor, (room, name) in WHERE.items():
        if values := config.factors[factor]:
            found += [(factor, value) for value in sorted({*values, config[room][name]})]
    return found


def at_point(config, factor: str, value: float):
    """The config with one value changed and the same number of examples to train on.

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
    """Of the first round's learning rate, over all rounds."""
    return (rounds + 1) / (2 * rounds)


def schedule(config):
    """Rounds and refreshes of a point."""
    from fedrag_jax.strategies.settings import Budget

    t, f = config.training, config.federated
    return Budget(t.rounds, t.local_steps, f.clients, participation=f.participation).schedule(
        "federated"
    )


def point_name(config) -> str:
    """The folder of a point."""
    f = config.federated
    steps, rounds = config.training.local_steps, config.training.rounds
    return f"alpha{f.alpha:g}-clients{f.clients}-steps{steps}x{rounds}-part{f.participation:g}"


def scaled(run: Comparison, factor: float) -> Comparison:
    """The same point at learning rates times a factor."""
    config = run.config.copy_and_resolve_references()
    for part in config.learning_rates.federated:
        config.learning_rates.federated[part] *= factor
    return run.like(config, run.folder / f"rates-x{factor:g}")


def at_best_rates(run: Comparison, strategy: str) -> Comparison:
    """The point at the rates that serve a strategy best on validation questions, first two seeds.

    By MRR where the retriever is tuned with labels, else by F1, which is less noisy than EM.
    """
    from fedrag_jax.evaluation import evaluator

    examples = validation_sample(run.config, run.dataset)
    ranked = strategy == "retriever" and any(e.positive_ids for e in examples)

    def score(factor, pair):
        (system,), _ = scaled(run, factor).tuned_systems(strategy, "federated", *pair)
        if not ranked:
            return np.mean(evaluator.evaluate(system, examples)["f1"])
        rows, _ = system.retriever.search([e.question for e in examples], evaluator.RANKED)
        return np.nanmean(evaluator.rank_scores(system.retriever, examples, rows)["mrr"])

    def judge(factor):
        return float(np.mean([score(factor, pair) for pair in replicates(run.config)[:2]]))

    path = run.folder / f"rates-{strategy}.json"
    what = f"{strategy}, {run.folder.name}"
    judged = one_by_one(judge, what)
    return scaled(run, chosen_rate(path, run.config.rate_factors, judged, what))


def finished_at(config, folder: pathlib.Path, strategy: str) -> list:
    """The finished cells of a strategy at a point; untuned is untuned everywhere."""
    here = folder / "points" / point_name(config)
    if strategy == "none":
        here = folder
    elif (path := here / f"rates-{strategy}.json").exists():
        here = here / f"rates-x{kept_rate(path):g}"
    return finished(config, here, strategy, "federated")


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """A row for every point and strategy, with its difference from the point of the config."""
    from experiments.reporting import comparison, differences
    from fedrag_jax.strategies.settings import parse

    rows, margin = [], config.equivalence_margin
    for factor, value in points(config):
        here, (room, name) = at_point(config, factor, value), WHERE[factor]
        for strategy in config.strategies:
            if not (cells := finished_at(here, folder, strategy)):
                continue
            setting = parse("federated", here.federated.alpha)
            (row,) = comparison.strategy_rows(cells, {"federated": setting})
            row |= {"factor": factor, "value": value}
            if strategy != "none":
                row["rounds"] = schedule(here).rounds
                row["examples"] = float(
                    np.mean([curve[-1]["examples"] for c in cells for curve in c.curves.values()])
                )
                if value != config[room][name]:
                    usual = finished_at(config, folder, strategy)
                    row["against"] = {
                        metric: found
                        for metric in comparison.METRICS
                        if (
                            found := differences.paired_difference(
                                cells, usual, metric, 100, margin
                            )
                        )
                    }
            rows.append(row)
    for metric in comparison.METRICS:
        compared = [row for row in rows if metric in row.get("against", {})]
        differences.adjust([row["against"][metric] for row in compared])
        for row in compared:
            row |= {f"{metric}_by_{name}": x for name, x in row["against"][metric].items()}
    for row in rows:
        row.pop("against", None)
    return rows


def report(config, folder: pathlib.Path):
    """Writes heterogeneity.csv and returns the `Report`."""
    from experiments.reporting import figures, tables
    from experiments.reporting.comparison import METRICS
    from experiments.reporting.report import Report, Section

    rows = rows_of(config, folder)
    first = ("factor", "value", "strategy", "seeds", "em", "em_low", "em_high")
    others = (name for row in rows for name in row)
    tables.write_csv(folder / "heterogeneity.csv", rows, list(dict.fromkeys([*first, *others])))

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
        f"Federated fine-tuning on {config.data.name}, one factor varied at a time around {usual}. "
        "Every point takes as many local steps of as many examples, except for clients that hold fewer "
        "than a batch.",
        [
            Section(
                "Figure",
                "heterogeneity",
                "Exact match with its 95% interval over test questions. The dotted line is the untuned "
                "system, the open mark the usual point.",
                figure=figures.over_factors(rows, NAMES, open_marks),
            ),
            Section(
                "Quality",
                "points",
                "Metrics in percent with 95% intervals over seeds and questions. Learning rates were "
                "searched on validation questions at every point, with the first two seeds. The worst "
                "client is that of one set of client mixtures for all points, those of the usual "
                f"point's split.{untuned}",
                tables.Table((*who, *quality), tuned),
            ),
            Section(
                "Against the usual point",
                "differences",
                "Differences in points from the usual point, paired by question and seed; p over "
                "questions, over seeds (from five on), and of equivalence within "
                f"{config.equivalence_margin:g} points, Holm-adjusted for each metric.",
                tables.Table((*who, *against), [row for row in tuned if "em_by_difference" in row]),
            ),
            Section(
                "Costs",
                "costs",
                "Refreshes are those of strategies that retrieve while they train: one a round, and "
                "fewer where a round draws few clients.",
                tables.Table((*who, *costs), tuned),
            ),
        ],
    )


def run(config, runs: str) -> pathlib.Path:
    """Every point; returns the folder of the results.

    Raises:
      ConfigError: as `inputs.check` and `at_point`.
    """
    from experiments.reporting import cells
    from experiments.reporting.weights_and_biases import log_cell
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.processes import everywhere

    began, folder = time.perf_counter(), pathlib.Path(runs) / config.name
    dataset = load_data(config)
    check(config)
    if tuple(config.settings) != ("federated",):
        raise ConfigError(f"config.settings must be ('federated',) here, got {config.settings}")
    if not config.rate_factors or min(config.rate_factors) <= 0:
        raise ConfigError(f"config.rate_factors must be positive, got {config.rate_factors}")
    warn_of_borrowed_rates(config)
    at = {point_name(c): c for c in (at_point(config, *point) for point in points(config))}
    if not at:
        raise ConfigError("config.factors: all are empty; give some values to one of them")
    whole = Comparison(config, dataset, folder)
    runs_at = [whole.like(c, folder / "points" / name) for name, c in at.items()]
    for there, (_, split) in itertools.product(runs_at, replicates(config)):
        there.clients("federated", split)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=FREE)
    write_manifest(folder, dataset, experiment="heterogeneity", seeds=list(config.seeds))
    strategies = trainable_strategies(config, dataset)
    todo = [(whole, "none")] if "none" in strategies else []
    todo += itertools.product(runs_at, [s for s in strategies if s != "none"])
    for i, (point, strategy) in enumerate(todo, 1):
        there = point if strategy == "none" else at_best_rates(point, strategy)
        for seed, split in replicates(config):
            c, wandb = there.config, config.wandb
            about = {factor: c[room][name] for factor, (room, name) in WHERE.items()}
            known = cells.load(there.folder, strategy, "federated", seed, split)
            if everywhere(known is not None):
                log_cell(known, folder, config.name, **wandb, config=c.to_dict(), **about)
                continue
            try:
                cell = compute_cell(there, strategy, "federated", seed, split, controls=False)
            except DivergenceError as error:  # one run of many: the others are worth having
                print(f"{strategy}, {point.folder.name}, seed {seed}: {error}")
                continue
            cells.save(there.folder, cell)
            log_cell(cell, folder, config.name, **wandb, config=c.to_dict(), **about)
        done = finished_at(point.config, folder, strategy)
        em = 100 * np.mean([c.scores["em"].mean() for c in done]) if done else math.nan
        print(
            f"[{i}/{len(todo)}] {strategy}, {point.folder.name}: EM {em:.1f} over {len(done)} seeds  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    return write_report(report(config, folder), folder, "heterogeneity.csv")


if __name__ == "__main__":
    launch(run, "configs/heterogeneity.py")
