"""Training strategies against inference modes: exact match, F1 and seconds of every pair.

    python -m experiments inference_modes

Results go to runs/<name>/: inference_modes.csv, table.md, report.html. A cell (strategy, mode, seeds)
that is finished is not computed again, nor is a training.
"""

import functools
import itertools
import pathlib
import time

import numpy as np

from experiments.lab import Lab
from experiments.loading import check as check_comparison
from experiments.loading import (
    load_data,
    replicates,
    require_known,
    require_some,
    trainable_strategies,
)
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.comparison import METRICS
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.generation.inference import BEAMS, MODES
from fedrag_jax.tracking.ledger import Cost

TIMED_QUESTIONS = 100


class Answering(Lab):
    """The data and systems of a lab, and the last tuned system, which is tested in every mode."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tuned = functools.lru_cache(maxsize=1)(self._tuned)

    def _tuned(self, strategy: str, seed: int, split: int):
        (system,), _ = self.tuned_systems(strategy, self.config.regimes[0], seed, split)
        return system


def compute(lab: Answering, point: Point) -> cells.Cell:
    """Answers the test questions by one system in one mode.

    Seconds are measured afterwards on some of the questions, when every program is compiled.
    """
    strategy, mode, seed, split = point.name, point.regime, point.seed, point.split
    test, beams = lab.dataset.test, beams_of(lab.config, mode)
    system = lab.tuned(strategy, seed, split)
    scores = evaluate(system, test, mode=mode, beams=beams)
    some, start = test[:TIMED_QUESTIONS], time.perf_counter()
    evaluate(system, some, mode=mode, beams=beams)
    seconds = (time.perf_counter() - start) * len(test) / len(some)
    cost = Cost(evaluate_seconds=seconds)
    return cells.Cell(strategy, mode, seed, split, scores, {}, [], cost, {}, lab.asked_clusters)


def beams_of(config, mode: str) -> int | None:
    """Returns the number of beams for a mode; None for modes without beams."""
    return config.beams or None if mode in BEAMS else None


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every strategy and mode, with its difference from `concatenated`."""
    rows = []
    for strategy, mode in itertools.product(config.strategies, config.modes):
        if not (found := finished(config, folder, strategy, mode)):
            continue
        seconds = [c.cost.evaluate_seconds / len(c.scores["em"]) for c in found]
        row = {"strategy": strategy, "mode": mode, "seeds": len(found)}
        row |= {"questions": len(found[0].scores["em"]), "seconds": float(np.mean(seconds))}
        for metric in ("em", "f1"):
            row |= comparison.estimate(found, metric)
        if mode != "concatenated" and (usual := finished(config, folder, strategy, "concatenated")):
            row |= differences.paired_difference(found, usual, config.primary_metric)
        rows.append(row)
    differences.adjust([row for row in rows if "p" in row])
    return rows


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    em = {(row["strategy"], row["mode"]): f"{row['em']:.1f}" for row in rows}
    glance = [
        {"strategy": strategy} | {mode: em.get((strategy, mode)) for mode in config.modes}
        for strategy in config.strategies
    ]
    columns = (
        tables.words("strategy", "strategy"),
        tables.words("mode", "mode"),
        tables.number("seeds", "seeds", 0),
        tables.interval("EM [95% CI]", "em"),
        tables.interval("F1 [95% CI]", "f1"),
        tables.difference(f"{METRICS[config.primary_metric]} against concatenated [95% CI]"),
        tables.p_value("p", "p_holm"),
        tables.number("ms per question", "seconds", 1, 1e-3),
    )
    return Report(
        folder.name,
        f"Training strategies against answering modes: {config.data.name}, {config.regimes[0]}, "
        f"{config.retrieval.top_k} passages read.",
        [
            Section(
                "At a glance",
                "glance",
                "Exact match in percent: training strategies in rows, answering modes in columns.",
                tables.Table(
                    [tables.words("strategy", "strategy"), *map(_mode_column, config.modes)], glance
                ),
            ),
            Section(
                "Quality and cost",
                "inference_modes",
                "Metrics in percent with 95% intervals over seeds and questions. Differences "
                "from answers to one prompt with all passages, by the same system, are paired by "
                "question and seed; p by permutation over questions, Holm-adjusted over this "
                "table. Time is elapsed, including retrieval and excluding compilation.",
                tables.Table(columns, rows),
            ),
        ],
        {"inference_modes.csv": rows},
    )


def _mode_column(mode: str):
    return tables.words(mode, mode)._replace(align="right")


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: as `loading.check`; an unknown mode, none, negative beams; a regime with several
        systems, or several regimes.
    """
    check_comparison(config)
    if len(config.regimes) != 1 or config.regimes[0].startswith("local"):
        raise ConfigError(f"config.regimes must be one, and not local, here; got {config.regimes}")
    require_some(config, "modes")
    require_known("config.modes", config.modes, MODES)
    if config.beams < 0:
        raise ConfigError(f"config.beams must be at least 0, got {config.beams}")


def lab(config, folder: pathlib.Path) -> Answering:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: as `check`.
    """
    check(config)
    return Answering(config, load_data(config), folder)


def points(lab: Answering) -> list[Point]:
    """Returns all cells: every mode of each tuned system; a key's regime is the mode."""
    config = lab.config
    return [
        Point(strategy, mode, *pair)
        for strategy, pair, mode in itertools.product(
            trainable_strategies(config, lab.dataset), replicates(config), config.modes
        )
    ]


def summary(cell) -> str:
    """Returns a line with a cell's metrics."""
    return f"EM {100 * cell.scores['em'].mean():.1f}  F1 {100 * cell.scores['f1'].mean():.1f}"


EXPERIMENT = Experiment(
    name="inference_modes",
    free=("seeds", "split_seeds", "strategies", "modes"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
