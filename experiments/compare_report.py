"""The report of experiments/compare_strategies.py: CSV files, tables, figures."""

import itertools
import pathlib

from experiments.loading import rates_name, replicates
from experiments.reporting import comparison, differences, figures
from experiments.reporting import comparison_tables as tables
from experiments.reporting.cells import Cell
from experiments.reporting.page import Report, Section
from experiments.run import finished
from fedrag_jax.files import read_json
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import parse

INTERVALS = (
    "95% intervals resample seeds and questions together (two-level bootstrap; questions about one "
    "article or gold passage as one); ± is the standard deviation over seeds."
)


def regimes_of(config) -> dict:
    """Returns the `Regime` of each regime of the config, by name."""
    return {regime: parse(regime, config.federated.alpha) for regime in config.regimes}


def all_cells(config, folder: pathlib.Path) -> list[Cell]:
    """Returns all finished cells, by regime."""
    names = itertools.product(config.regimes, config.strategies)
    return [cell for where, name in names for cell in finished(config, folder, name, where)]


def rows_of(config, done: list[Cell]) -> dict[str, list[dict]]:
    """Returns the rows of each table by its name, and the points of all learning curves."""
    regimes, primary = regimes_of(config), config.primary_metric
    metrics = (primary, *(m for m in comparison.METRICS if m != primary))
    margin, alpha = config.equivalence_margin, config.federated.alpha
    strategies = comparison.strategy_rows(done, regimes)
    for row in strategies:
        row["search_seconds"] = search_seconds(config, row["strategy"], row["regime"])
    compared = [differences.comparison_rows(done, m, regimes, margin) for m in metrics]
    alone = [
        differences.headline_rows(done, name(m), regimes, alpha)
        for name in (str, comparison.own)
        for m in metrics
    ]
    return {
        "strategies": strategies,
        "comparisons": [row for found in compared for row in found],
        "against_local": [row for found in alone for row in found],
        "against_independent": differences.independent_rows(done, margin),
        "controls": comparison.control_rows(done),
        "traffic": comparison.traffic_rows(done),
    }


def curve_rows(done: list[Cell]) -> list[dict]:
    """Returns a row for each point of each learning curve."""
    return [
        {
            "strategy": cell.strategy,
            "regime": cell.regime,
            "seed": cell.seed,
            "split": cell.split,
            "task": task,
        }
        | point
        for cell in done
        for task, points in cell.curves.items()
        for point in points
    ]


def search_seconds(config, strategy: str, regime: str) -> float | None:
    """Returns the device-seconds of a strategy's learning-rate searches; None if unknown."""
    known = config.search_seconds
    needed = {*named(strategy).rates.values()}
    if not needed:
        return 0.0
    where = rates_name(config, regime)
    if where not in known or not all(name in known[where] for name in needed):
        return None
    return float(sum(known[where][name] for name in needed))


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    done, primary = all_cells(config, folder), config.primary_metric
    found = rows_of(config, done)
    rows, alone, title = found["strategies"], found["against_local"], comparison.METRICS[primary]
    of_primary = [row for row in alone if row["metric"] == primary]
    compared = [row for row in found["comparisons"] if row["metric"] == primary]
    alphas = {s.alpha for s in regimes_of(config).values() if s.kind != "centralised"}
    different = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
    split = f", Dirichlet alpha {different} over {config.federated.column}" if alphas else ""
    sections = [
        Section(
            "At a glance",
            "glance",
            f"Exact match in percent. {INTERVALS}",
            tables.glance_table(rows),
        ),
        Section(
            f"Federated against a lone client, {title}",
            "headline",
            "Federated training, of an algorithm's longest budget, compared with the better of two "
            "lone clients: `local` takes as many steps as a client takes in federated training; "
            "`local_converged` trains until validation stops improving. All are means over the "
            f"pairs of seeds that the compared regimes share. {differences_said(of_primary, title)}",
            tables.headline_table(of_primary),
        ),
        Section(
            "The same for every metric",
            "against_local",
            "Differences in points, on all test questions and on questions from each client's "
            "own topics. p over questions and, from five seeds on, over seeds, Holm-adjusted for "
            "each metric.",
            tables.against_local_table(alone),
        ),
        Section(
            "Strategies",
            "strategies",
            f"Metrics in percent. {INTERVALS} Epochs are those of the kept models, for each task. "
            "At cap: number of trainings that should have ended by validation but whose last "
            "evaluation was their best. Seconds of training, retrieval and index refresh are "
            "elapsed seconds, and device-seconds; the search for learning rates is in "
            "device-seconds.",
            tables.strategies_table(rows),
        ),
        Section(
            "On a client's own topics",
            "own_topics",
            "Means over clients of the model that each would use, on questions in the "
            "proportions of its own topics. The questions are test questions or, if no client "
            "holds their topics, training questions about passages that no client trained on.",
            tables.own_topics_table(rows),
        ),
        Section(
            "Quality and cost",
            "quality_cost",
            "Exact match with its 95% interval against seconds of training.",
            figure=figures.quality_against_cost(rows),
        ),
        Section(
            "Learning curves",
            "learning_curves",
            "Training loss over the number of examples seen: mean over seeds, with a band from "
            "minimum to maximum.",
            figure=figures.learning_curves(done),
        ),
        Section(
            "Without gold passages",
            "without_labels",
            "If training questions name no gold passages, strategies that need none have the "
            "same results as above, because they do not use them.",
            tables.without_labels_table(rows),
        ),
        Section(
            "Regimes against each other, every metric",
            "regimes",
            "Differences in points with 95% intervals. *: significant (p < 0.05 over questions, "
            f"Holm-adjusted over the metric). ≈: equivalent within {config.equivalence_margin:g} "
            "points (two one-sided tests, p < 0.05, Holm-adjusted). No mark: neither is shown.",
            tables.every_metric_table(found["comparisons"]),
        ),
        Section(
            f"Paired comparisons of {title}, the primary metric",
            "comparisons",
            "Difference in points with its 95% interval; Cohen's d_z; percent of questions that "
            "are better and worse. p over questions (permutation test) holds for these trained "
            "models; p over seeds, from five seeds on, holds for the methods; p of equivalence "
            f"is within {config.equivalence_margin:g} points. All are Holm-adjusted over this "
            "table.",
            tables.comparisons_table(compared),
        ),
        Section(
            "Against independent tuning",
            "against_independent",
            "Differences in points from independent tuning in the same regime, paired by "
            "question and seed; marks as above, Holm-adjusted for each metric. Seconds and "
            "operations are multiples of those of independent tuning, mean over seeds.",
            tables.independent_table(found["against_independent"]),
        ),
        Section(
            "Time by part",
            "times",
            "Seconds, mean over seeds, summed over clients in the local regime. Collating "
            "includes likelihoods under a frozen generator; aggregation includes everything in a "
            "round that is not a local step. Passages are embedded once. A program is compiled "
            "for the first cell that needs it.",
            tables.times_table(rows),
        ),
        Section(
            "Costs",
            "costs",
            "Operations of training steps, by formula and by the compiler; memory of the largest "
            "round on a device; tokens read in training; bytes of trained parameters. Every "
            "client holds the whole corpus and its index: the table gives their bytes on the way "
            "to the clients.",
            tables.costs_table(rows),
        ),
        Section(
            "Traffic",
            "traffic",
            "Bytes of trained parameters sent between clients and server, by part and type.",
            tables.traffic_table(found["traffic"]),
        ),
        Section(
            "Clients",
            "clients",
            "EM on one set of client mixtures for all splits (that of alpha "
            f"{config.federated.alpha:g}), and its difference from the centralised model on the "
            "same mixtures, over the pairs of seeds that both have.",
            tables.clients_table(rows),
        ),
        Section(
            "Controls", "controls", controls_said(folder), tables.controls_table(found["controls"])
        ),
    ]
    return Report(
        folder.name,
        "Comparison of strategies for fine-tuning retrieval-augmented generation, with pooled "
        f"and with distributed data: {config.data.name}, {config.federated.clients} "
        f"clients{split}; pairs of seeds: {len(replicates(config))}.",
        sections,
        {f"{name}.csv": some for name, some in found.items()} | {"metrics.jsonl": curve_rows(done)},
        {"strategies.csv": comparison.COLUMNS},
    )


def differences_said(rows: list[dict], title: str) -> str:
    """Returns how much of federated training's gain over a lone client is compute, how much data."""
    parted = [row for row in rows if "data" in row]
    if not parted:
        return ""
    said = "; ".join(
        f"{row['strategy']} ({row['regime']}) {row['compute'] + row['data']:+.1f} = "
        f"{row['compute']:+.1f} compute "
        f"{row['data']:+.1f} data"
        for row in parted
    )
    return (
        f"Federated training is better than `local` by the following points of {title}. The part "
        "of `local_converged` is compute, which a lone client could have spent alone; the rest "
        f"is due to other clients' data: {said}."
    )


def controls_said(folder: pathlib.Path) -> str:
    """Returns a paragraph on the controls, with the largest change by training at learning rate 0."""
    said = (
        "EM in percent without passages, with only a distractor, and with only the gold "
        "passages. Index recall: percentage of the nearest passages that an approximate index "
        "finds."
    )
    if (no_op_file := folder / "no_op.json").exists():
        change = read_json(no_op_file)["largest_change"]
        said += f" Training at learning rate zero changed scores by {change:.1f}."
    return said
