"""Fine-tuning strategies for RAG, centralised, federated and local: one table with costs.

    python -m experiments.compare_strategies --config=configs/compare_strategies.py
    python -m experiments.compare_strategies --config=configs/compare_strategies.py \
        --config.name=more-clients --config.federated.clients=32

Results go to runs/<name>/. A cell (strategy, setting, seeds) that is finished is not computed again,
and a training that was killed goes on from its last checkpoint.
"""

import dataclasses
import itertools
import pathlib
import time

import numpy as np

from experiments.cell_by_cell import write_report
from experiments.comparison import CONTROL_QUESTIONS, Comparison, compute_cell
from experiments.inputs import (
    algorithm_of,
    check,
    load_data,
    rates_name,
    replicates,
    trainable_strategies,
    warn_of_borrowed_rates,
)
from experiments.launch import launch, settled_config
from fedrag_jax.data.examples import sample
from fedrag_jax.files import kept, read_json, write_json

# What may differ between calls whose cells lie side by side.
FREE = (
    "seeds", "split_seeds", "strategies", "settings", "local_strategies", "search_seconds",
    "equivalence_margin", "wandb",
)  # fmt: skip


def no_op(run: Comparison, seed: int, split: int) -> float:
    """Largest change of any test score after joint training at learning rate zero; must be 0."""
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.federated.by_name import OWN_STEPS
    from fedrag_jax.strategies.strategies import joint_token

    setting = run.config.settings[-1]  # one whose program is compiled
    if algorithm_of(run.config, setting)[0] in OWN_STEPS:
        setting = "centralised"  # for those steps cannot be of length zero
    client = 0 if setting.startswith("local") else None
    tuner = run.tuner(lambda task, part: 0.0, setting, seed, split, client)
    tuner = dataclasses.replace(
        tuner,
        folder=run.folder / "tuned" / f"no-op-seed{seed}",
        budget=tuner.budget._replace(rounds=1, stopping=None),
    )
    some = sample(run.dataset.test, CONTROL_QUESTIONS, 0)
    before = evaluate(run.system(seed), some)
    after = evaluate(joint_token(run.system(seed), run.dataset, tuner), some)
    return 100 * max(float(np.nan_to_num(np.abs(after[m] - before[m])).max()) for m in before)


def run(config, runs: str) -> pathlib.Path:
    """The whole comparison; returns its folder."""
    from experiments.reporting import cells
    from experiments.reporting.weights_and_biases import log_cell
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.processes import everywhere

    began = time.perf_counter()
    dataset = load_data(config)
    check(config)
    warn_of_borrowed_rates(config)
    folder = pathlib.Path(runs) / config.name
    comparison = Comparison(config, dataset, folder)
    for setting, (_, split) in itertools.product(config.settings, replicates(config)):
        comparison.clients(setting, split)  # refuses what cannot be split
        rates_name(config, setting)  # and what has no learning rates
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=FREE)
    seeds = {"model": list(config.seeds), "client split": [p for _, p in replicates(config)]}
    write_manifest(folder, dataset, experiment="compare_strategies", seeds=seeds)
    strategies = trainable_strategies(config, dataset)
    alone = config.local_strategies or strategies
    todo = [
        (strategy, setting, seed, split)
        for seed, split in replicates(config)
        for setting in config.settings
        for strategy in strategies
        if strategy in alone or not setting.startswith("local")
    ]
    for i, (strategy, setting, seed, split) in enumerate(todo, 1):
        known = cells.load(folder, strategy, setting, seed, split)
        if everywhere(known is not None):
            log_cell(known, folder, config.name, **config.wandb, config=config.to_dict())
            continue
        cell = compute_cell(comparison, strategy, setting, seed, split)
        cells.save(folder, cell)
        log_cell(cell, folder, config.name, **config.wandb, config=config.to_dict())
        print(
            f"[{i}/{len(todo)}] {strategy}, {setting}, {cells.seeds_name(seed, split)}: EM "
            f"{100 * cell.scores['em'].mean():.1f}  Recall@5 "
            f"{100 * cell.scores['recall_at_5'].mean():.1f}  trained {cell.cost.seconds:.0f} s  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    if kept(read_json, folder / "no_op.json") is None:
        change = no_op(comparison, *replicates(config)[0])
        write_json(folder / "no_op.json", {"largest_change": change})
    return write_report(report(config, folder), folder, "CSV files of all rows and")


def report(config, folder: pathlib.Path):
    """Writes the rows of all finished cells and returns the `Report` on them."""
    from experiments import compare_report

    return compare_report.report(config, folder)


if __name__ == "__main__":
    launch(run, "configs/compare_strategies.py")
