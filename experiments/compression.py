"""Quality against bytes: strategies trained with compressed messages.

    python -m experiments compression

Results go to runs/<name>/: compression.csv, table.md, report.html, figures. A finished cell (kind of
message, strategy, seeds) is not computed again.
"""

import itertools
import pathlib

from experiments.compare_strategies import summary
from experiments.lab import METRICS, Lab, compute_cell
from experiments.loading import (
    check_replicates,
    check_scores,
    load_data,
    replicates,
    require_federated,
    require_known,
    require_some,
)
from experiments.reporting import cells, comparison, differences, experiment_figures, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.strategies.own import named

REGIME = "federated"


def with_messages(config, kind: str):
    """Returns the config of a comparison with this kind of message."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.federated.algorithm_options.update(config.codecs[kind])
    return config


class Messages(Lab):
    """A lab for each kind of message, each with its own folder."""

    def at(self, kind: str) -> Lab:
        return self.like(with_messages(self.config, kind), self.folder / kind)


def lab(config, folder: pathlib.Path) -> Messages:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: no kinds of messages or strategies; an unknown codec; a missing learning rate; a
        regime other than the federated one.
    """
    check_replicates(config)
    check_scores(config)
    require_some(config, "messages", "strategies")
    require_federated(config, "other regimes send no messages")
    more = ", or add it to config.codecs"
    require_known("config.messages", config.messages, config.codecs, more)
    federated = config.federated
    for kind in config.messages:
        options = {**federated.algorithm_options, **config.codecs[kind]}
        by_name.check(federated.algorithm, options, f"config.codecs.{kind}")
    found = Messages(config, load_data(config), folder)
    for _, split in replicates(config):
        found.clients(REGIME, split)
    for row in map(named, config.strategies):
        for part in row.rates:
            found.rate(REGIME, row, part)
    return found


def points(lab: Messages) -> list[Point]:
    """Returns all cells, by seed, strategy and kind of message."""
    config = lab.config
    return [
        Point(strategy, REGIME, *pair, folder=kind)
        for pair, strategy, kind in itertools.product(
            replicates(config), config.strategies, config.messages
        )
    ]


def compute(lab: Messages, point: Point) -> cells.Cell:
    """Trains and tests a strategy with one kind of message."""
    run = lab.at(point.folder)
    return compute_cell(run, point.name, point.regime, point.seed, point.split, controls=False)


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each strategy and kind of message, with differences from the first kind."""
    rows, usual = [], config.messages[0]
    for strategy, kind in itertools.product(config.strategies, config.messages):
        if not (found := finished(config, folder / kind, strategy, REGIME)):
            continue
        row = {"strategy": strategy, "messages": kind, "seeds": len(found), **config.codecs[kind]}
        plain = finished(config, folder / usual, strategy, REGIME)
        for metric in METRICS:
            row |= comparison.estimate(found, metric)
            if kind != usual and plain:
                row |= differences.paired_difference(found, plain, metric, prefix=f"{metric}_by_")
        row |= comparison.costs_and_clients(found)
        row["bytes"] = row["bytes_up"] + row["bytes_down"]
        rows.append(row)
    for metric in METRICS:
        differences.adjust(rows, f"{metric}_by_")
    for row in rows:
        row["pareto"] = "yes" if best_of_its_size(row, rows, config.primary_metric) else ""
    return rows


def best_of_its_size(row: dict, rows: list[dict], metric: str) -> bool:
    """Returns whether a row is on the Pareto front of its strategy.

    It is if no other kind of message has at least its score with fewer bytes, or a better score with as
    many bytes.
    """

    def beats(other):
        as_good = other[metric] >= row[metric] and other["bytes"] <= row["bytes"]
        return as_good and (other[metric], other["bytes"]) != (row[metric], row["bytes"])

    others = [r for r in rows if r["strategy"] == row["strategy"] and r[metric] is not None]
    return row[metric] is not None and not any(map(beats, others))


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows, primary = rows_of(config, folder), config.primary_metric
    title, t = comparison.METRICS, config.training
    columns = (
        *(tables.words(name, name) for name in ("strategy", "messages", "up", "down")),
        tables.number("seeds", "seeds", 0),
        tables.number("MB up", "bytes_up", 3, 1e6),
        tables.number("MB down", "bytes_down", 3, 1e6),
        *(tables.interval(f"{title[metric]} [95% CI]", metric) for metric in METRICS),
        tables.difference(f"{title[primary]} against plain [95% CI]", f"{primary}_by_"),
        tables.p_value("p", f"{primary}_by_p_holm"),
        tables.p_value("over seeds", f"{primary}_by_p_t_holm"),
        tables.words("Pareto", "pareto"),
        tables.number("seconds", "seconds"),
    )
    return Report(
        folder.name,
        f"Compressed messages of {config.federated.clients} clients: {config.data.name}, {t.rounds} "
        f"rounds of {t.local_steps} local steps.",
        [
            Section(
                "Figure",
                "pareto",
                "Quality over the bytes of updates and models, summed over clients and rounds, with "
                "95% intervals.",
                figure=experiment_figures.over_bytes(rows, primary),
            ),
            Section(
                "Quality and bytes",
                "compression",
                "Metrics in percent with 95% intervals over seeds and questions. Bytes are the sizes "
                "of the encoded messages. Differences are from the first kind of message, paired by "
                "question and seed. p, by permutation over questions, is about these trained models; p "
                "over seeds is about the codecs; both are Holm-adjusted over the table. Learning rates "
                "are those of plain messages. Pareto: no other kind is as good with fewer bytes.",
                tables.Table(columns, rows),
            ),
        ],
        {"compression.csv": rows},
    )


EXPERIMENT = Experiment(
    name="compression",
    free=("seeds", "split_seeds", "strategies", "messages", "primary_metric"),
    defined=("codecs",),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
