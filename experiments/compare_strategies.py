"""Fine-tuning strategies for RAG, centralised, federated and local: one table with costs.

    python -m experiments compare_strategies
    python -m experiments compare_strategies --config.name=more-clients --config.federated.clients=32
    python -m experiments compare_strategies --config=configs/fedrag_recipe.py

Results go to runs/<name>/. A finished cell (strategy, regime, seeds) is not computed again, and a
killed training resumes from its last checkpoint.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from experiments import compare_report
from experiments.lab import Lab, compute_cell
from experiments.loading import (
    algorithm_of,
    check,
    load_data,
    pairs_of,
    rates_name,
    replicates,
    strategies_of,
    trainable_strategies,
    warn_of_borrowed_rates,
)
from experiments.reporting.cells import Cell
from experiments.run import Experiment, Point
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.algorithms.by_name import OWN_STEPS
from fedrag_jax.files import kept, read_json, write_json
from fedrag_jax.strategies.own import named
from fedrag_jax.tracking.processes import everywhere


def lab(config, folder: pathlib.Path) -> Lab:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: as `check`; a split that cannot be, a learning rate that is missing.
    """
    check(config)
    dataset = load_data(config)
    warn_of_borrowed_rates(config)
    found = Lab(config, dataset, folder)
    for regime, (_, split) in itertools.product(config.regimes, replicates(config)):
        found.clients(regime, split)
    for regime in config.regimes:
        rates_name(config, regime)
        for strategy in map(named, strategies_of(config, regime, config.strategies)):
            for part in strategy.rates:
                found.rate(regime, strategy, part)
    return found


def points(lab: Lab) -> list[Point]:
    """Returns all cells, by seed and regime, within the limits of each regime."""
    config = lab.config
    strategies = trainable_strategies(config, lab.dataset)
    return [
        Point(strategy, regime, *pair)
        for number, pair in enumerate(replicates(config))
        for regime in config.regimes
        if number < pairs_of(config, regime)
        for strategy in strategies_of(config, regime, strategies)
    ]


def compute(lab: Lab, point: Point) -> Cell:
    """Trains a strategy in a regime and tests it."""
    return compute_cell(lab, point.name, point.regime, point.seed, point.split)


def summary(cell: Cell) -> str:
    """Returns a line with a cell's metrics and seconds."""
    found = {"EM": cell.scores["em"], "Recall@5": cell.scores["recall_at_5"]}
    scored = {title: scores[~np.isnan(scores)] for title, scores in found.items()}
    said = [f"{title} {100 * scores.mean():.1f}" for title, scores in scored.items() if scores.size]
    return "  ".join([*said, f"trained {cell.cost.seconds:.0f} s"])


def no_op(lab: Lab, strategy: str, regime: str, seed: int, split: int) -> float:
    """Largest change of any test score after a strategy's training at learning rate zero; must be 0."""
    client = 0 if regime.startswith("local") else None
    tuner = lab.tuner(lambda task, part: 0.0, regime, seed, split, client)
    tuner = dataclasses.replace(
        tuner,
        folder=lab.folder / "tuned" / f"no-op-seed{seed}",
        budget=tuner.budget._replace(rounds=1, stopping=None),
    )
    some = lab.control_questions()
    before = evaluate(lab.system(seed), some)
    after = evaluate(named(strategy)(lab.system(seed), lab.dataset, tuner), some)
    return 100 * max(float(np.nan_to_num(np.abs(after[m] - before[m])).max()) for m in before)


def controls(lab: Lab) -> None:
    """Measures the change by training at learning rate 0 and writes it to no_op.json.

    Trains what was trained last, whose program is compiled.
    """
    trained = [
        point
        for point in points(lab)
        if point.name != "none" and algorithm_of(lab.config, point.regime)[0] not in OWN_STEPS
    ]  # for those steps cannot be of length zero
    path = lab.folder / "no_op.json"
    if trained and not everywhere(kept(read_json, path) is not None):
        change = no_op(lab, trained[-1].name, trained[-1].regime, *replicates(lab.config)[0])
        write_json(path, {"largest_change": change})


EXPERIMENT = Experiment(
    name="compare_strategies",
    free=(
        "seeds", "split_seeds", "strategies", "regimes", "limits", "search_seconds",
        "equivalence_margin",
    ),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=compare_report.report,
    controls=controls,
)  # fmt: skip
