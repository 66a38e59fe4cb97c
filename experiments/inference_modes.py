"""Ways to train against ways to answer: exact match, F1 and seconds of every pair.

    python -m experiments.inference_modes --config=configs/inference_modes.py

Results go to runs/<name>/: inference_modes.csv, table.md, report.html. A cell (strategy, mode, seeds)
that is finished is not computed again, nor is a training.
"""

import functools
import itertools
import pathlib
import time

import numpy as np

from experiments.cell_by_cell import compute_missing, finished, write_report
from experiments.comparison import Comparison
from experiments.inputs import check as check_comparison
from experiments.inputs import load_data, replicates, trainable_strategies
from experiments.launch import launch, settled_config
from fedrag_jax.errors import ConfigError

TIMED_QUESTIONS = 100


def compute_cell(run: Comparison, system, strategy: str, mode: str, seed: int, split: int):
    """A cell: the test questions answered by one system in one mode.

    What that costs is measured on some of them afterwards, when every program is compiled.
    """
    from experiments.reporting import cells
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.tracking.ledger import Cost

    test, beams = run.dataset.test, beams_of(run.config, mode)
    scores = evaluate(system, test, mode=mode, beams=beams)
    some, start = test[:TIMED_QUESTIONS], time.perf_counter()
    evaluate(system, some, mode=mode, beams=beams)
    seconds = (time.perf_counter() - start) * len(test) / len(some)
    cost = Cost(evaluate_seconds=seconds)
    return cells.Cell(strategy, mode, seed, split, scores, {}, [], cost, {}, run.test_clusters)


def beams_of(config, mode: str) -> int | None:
    """Those of the config, for modes that have some."""
    from fedrag_jax.inference import BEAMS

    return config.beams or None if mode in BEAMS else None


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """A row for every strategy and mode, with its difference from `concatenated` answering."""
    from experiments.reporting import comparison, differences

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
            row |= differences.paired_difference(found, usual, config.primary_metric) or {}
        rows.append(row)
    differences.adjust([row for row in rows if "p" in row])
    return rows


def report(config, folder: pathlib.Path):
    """Writes inference_modes.csv and returns the `Report`."""
    from experiments.reporting import tables
    from experiments.reporting.comparison import METRICS
    from experiments.reporting.report import Report, Section

    rows = rows_of(config, folder)
    tables.write_csv(folder / "inference_modes.csv", rows)
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
        tables.number("ms a question", "seconds", 1, 1e-3),
    )
    return Report(
        folder.name,
        f"Ways to train against ways to answer: {config.data.name}, {config.settings[0]}, "
        f"{config.retrieval.top_k} passages read.",
        [
            Section(
                "At a glance",
                "glance",
                "Exact match in percent: ways to train in rows, ways to answer in columns.",
                tables.Table(
                    [tables.words("strategy", "strategy"), *map(_mode_column, config.modes)], glance
                ),
            ),
            Section(
                "Quality and cost",
                "inference_modes",
                "Metrics in percent with 95% intervals over seeds and questions. Differences from "
                "answers to one prompt with all passages, by the same system, are paired by question "
                "and seed; p by permutation over questions, Holm-adjusted over this table. Time is "
                "elapsed, with retrieval and without compiling.",
                tables.Table(columns, rows),
            ),
        ],
    )


def _mode_column(mode: str):
    from experiments.reporting import tables

    return tables.words(mode, mode)._replace(align="right")


def check(config) -> None:
    """Refuses settings that could only fail later.

    Raises:
      ConfigError: as `inputs.check`; an unknown mode, none, negative beams; a setting with several
        systems, or several settings.
    """
    from fedrag_jax.inference import MODES

    check_comparison(config)
    if len(config.settings) != 1 or config.settings[0].startswith("local"):
        raise ConfigError(
            f"config.settings must be one, and not local, here; got {config.settings}"
        )
    if not config.modes:
        raise ConfigError("config.modes is empty; give at least one")
    if unknown := [mode for mode in config.modes if mode not in MODES]:
        raise ConfigError(f"config.modes: {unknown} unknown; choose among {[*MODES]}")
    if config.beams < 0:
        raise ConfigError(f"config.beams must be at least 0, got {config.beams}")


def run(config, runs: str) -> pathlib.Path:
    """Every cell; returns the folder of the results.

    Raises:
      ConfigError: as `check`.
    """
    from fedrag_jax.tracking.manifest import write_manifest

    folder = pathlib.Path(runs) / config.name
    check(config)
    dataset = load_data(config)
    folder.mkdir(parents=True, exist_ok=True)
    free = ("seeds", "split_seeds", "strategies", "modes", "wandb")
    settled_config(config, folder, free=free)
    write_manifest(folder, dataset, experiment="inference_modes", seeds=list(config.seeds))
    todo = [
        (strategy, mode, pair)
        for strategy, pair, mode in itertools.product(
            trainable_strategies(config, dataset), replicates(config), config.modes
        )
    ]
    comparison = Comparison(config, dataset, folder)

    @functools.lru_cache(maxsize=1)  # for all modes
    def system(strategy, *pair):
        (tuned,), _ = comparison.tuned_systems(strategy, config.settings[0], *pair)
        return tuned

    def compute(strategy, mode, *pair):
        return compute_cell(comparison, system(strategy, *pair), strategy, mode, *pair)

    compute_missing(config, folder, todo, compute, told)
    return write_report(report(config, folder), folder, "inference_modes.csv")


def told(cell) -> str:
    """What people are told of a cell."""
    return f"EM {100 * cell.scores['em'].mean():.1f}  F1 {100 * cell.scores['f1'].mean():.1f}"


if __name__ == "__main__":
    launch(run, "configs/inference_modes.py")
