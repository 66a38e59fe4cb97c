"""Fine-tuning strategies for RAG, centralised, federated and local: one table with costs.

    python -m experiments.compare_strategies --config=configs/compare_strategies.py
    python -m experiments.compare_strategies --config=configs/compare_strategies.py \
        --config.name=more-clients --config.federated.clients=32

Results go to runs/<name>/. A cell (strategy, setting, seeds) that is finished is not computed again,
and a training that was killed goes on from its last checkpoint.
"""

import dataclasses
import itertools
import json
import pathlib
import time

import numpy as np

from experiments.comparison import CONTROL_QUESTIONS, Comparison, compute_cell
from experiments.inputs import (
    check,
    load_data,
    replicates,
    trainable_strategies,
    warn_of_borrowed_rates,
)
from experiments.launch import launch, settled_config


def no_op(run: Comparison, seed: int, split: int) -> float:
    """Largest change of any test score after joint training at learning rate zero; must be 0."""
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.strategies.strategies import joint_token

    setting = run.config.settings[-1]  # one whose program is compiled
    client = 0 if setting.startswith("local") else None
    tuner = run.tuner(setting, seed, split, client, rate=lambda task, part: 0.0)
    tuner = dataclasses.replace(
        tuner,
        folder=run.folder / "tuned" / f"no-op-seed{seed}",
        budget=tuner.budget._replace(rounds=1),
    )
    some = run.dataset.test[:CONTROL_QUESTIONS]
    before = evaluate(run.system(seed), some)
    after = evaluate(joint_token(run.system(seed), run.dataset, tuner), some)
    return 100 * max(float(np.nan_to_num(np.abs(after[m] - before[m])).max()) for m in before)


def report(config, folder: pathlib.Path):
    """Writes rows of all finished cells as CSV and returns the `Report` on them."""
    from fedrag_jax.strategies.settings import parse
    from fedrag_jax.tracking import cells, comparison, comparison_tables, figures
    from fedrag_jax.tracking.report import Report, Section
    from fedrag_jax.tracking.tables import write_csv

    done = [
        cell
        for setting in config.settings
        for strategy in config.strategies
        for seed, split in replicates(config)
        if (cell := cells.load(folder, strategy, setting, seed, split))
    ]
    alphas = {
        setting: parse(setting, config.federated.alpha)[1]
        for setting in config.settings
        if setting != "centralised"
    }
    rows = comparison.strategy_rows(done, alphas)
    primary = config.primary_metric
    compared = {
        metric: comparison.comparison_rows(done, metric, alphas)
        for metric in (primary, *(m for m in comparison.METRICS if m != primary))
    }
    controls, traffic = comparison.control_rows(done), comparison.traffic_rows(done)
    write_csv(folder / "strategies.csv", rows, comparison.COLUMNS)
    write_csv(folder / "comparisons.csv", [row for found in compared.values() for row in found])
    against = comparison.independent_rows(done)
    write_csv(folder / "against_independent.csv", against)
    write_csv(folder / "controls.csv", controls)
    write_csv(folder / "traffic.csv", traffic)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for cell in done:
            where = {"strategy": cell.strategy, "setting": cell.setting}
            where |= {"seed": cell.seed, "split": cell.split}
            for task, rounds in cell.curves.items():
                for record in rounds:
                    file.write(json.dumps(where | {"task": task} | record) + "\n")

    controlled = (
        "EM in percent without passages, with a distractor alone, with the gold passages alone."
    )
    if (no_op_file := folder / "no_op.json").exists():
        change = json.loads(no_op_file.read_text())["largest_change"]
        controlled += f" Training at learning rate zero changed scores by {change:.1f}."
    different = ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas.values())))
    split = f", Dirichlet alpha {different} over {config.federated.column}" if alphas else ""
    sections = [
        Section(
            "At a glance",
            "glance",
            "Exact match in percent with its 95% bootstrap interval over test questions.",
            comparison_tables.glance_table(rows),
        ),
        Section(
            "Strategies",
            "strategies",
            "Metrics in percent, EM with its 95% bootstrap interval over test questions and its "
            "standard deviation over seeds; seconds of training, retrieval and index refresh, elapsed, "
            "over all cores or devices.",
            comparison_tables.strategies_table(rows),
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
            "Training loss over examples seen: mean over seeds, in a band from least to most.",
            figure=figures.learning_curves(done),
        ),
        Section(
            "Without gold passages",
            "without_labels",
            "Where training questions name no gold passage, strategies that need none are as above, "
            "for they do not read it.",
            comparison_tables.without_labels_table(rows),
        ),
        Section(
            f"Paired comparisons of {comparison.METRICS[primary]}, the primary metric",
            "comparisons",
            "Difference in points with its 95% interval; Cohen's d_z; percent of questions that are "
            "better and worse; p by permutation over questions, which is what claims rest on, and from "
            "five seeds p over seeds, each Holm-adjusted over this table. Other metrics, each adjusted "
            "by itself, are in comparisons.csv.",
            comparison_tables.comparisons_table(compared[primary]),
        ),
        Section(
            "Against independent tuning",
            "against_independent",
            "Differences in points from independent tuning in the same setting, paired by question and "
            "seed, each metric Holm-adjusted over this table; seconds and operations as multiples of "
            "its own, the mean over seeds.",
            comparison_tables.independent_table(against),
        ),
        Section(
            "Time by part",
            "times",
            "Seconds, mean over seeds, summed over clients in the local setting. Collating includes "
            "likelihoods under a frozen generator, aggregation all of a round that is no local step; "
            "passages are embedded once. A program is compiled for the first cell that needs it.",
            comparison_tables.times_table(rows),
        ),
        Section(
            "Costs",
            "costs",
            "Operations of training steps, by formula and by the compiler; memory of the largest round "
            "on a device; tokens read in training; bytes of what is trained, and of the corpus and its "
            "index on their way to the clients.",
            comparison_tables.costs_table(rows),
        ),
        Section(
            "Traffic",
            "traffic",
            "What is trained on its way between clients and server, by part and type.",
            comparison_tables.traffic_table(traffic),
        ),
        Section(
            "Clients",
            "clients",
            "EM of the model each client would use, on questions such as it holds.",
            comparison_tables.clients_table(rows),
        ),
        Section(
            "Controls",
            "controls",
            controlled,
            comparison_tables.controls_table(controls),
        ),
    ]
    return Report(
        folder.name,
        "Ways to fine-tune a retrieval-augmented generator, where the data sits together and where it "
        f"does not: {config.data.name}, {config.federated.clients} clients{split}; "
        f"pairs of seeds: {len(replicates(config))}.",
        sections,
    )


def run(config, runs: str) -> pathlib.Path:
    """The whole comparison; returns its folder."""
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.processes import everywhere
    from fedrag_jax.tracking.weights_and_biases import log_cell

    began = time.perf_counter()
    dataset = load_data(config)
    check(config)
    warn_of_borrowed_rates(config)
    folder = pathlib.Path(runs) / config.name
    comparison = Comparison(config, dataset, folder)
    for setting, (_, split) in itertools.product(config.settings, replicates(config)):
        comparison.clients(setting, split)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("seeds", "split_seeds", "strategies", "settings", "wandb"))
    seeds = {"model": list(config.seeds), "client split": [p for _, p in replicates(config)]}
    write_manifest(folder, dataset, experiment="compare_strategies", seeds=seeds)
    strategies = trainable_strategies(config, dataset)
    todo = [
        (strategy, setting, seed, split)
        for seed, split in replicates(config)
        for setting in config.settings
        for strategy in strategies
    ]
    for i, (strategy, setting, seed, split) in enumerate(todo, 1):
        if everywhere(cells.load(folder, strategy, setting, seed, split) is not None):
            continue
        cell = compute_cell(comparison, strategy, setting, seed, split)
        cells.save(folder, cell)
        log_cell(
            cell, folder, config.name, config.wandb.mode, config.wandb.project, config.to_dict()
        )
        print(
            f"[{i}/{len(todo)}] {strategy}, {setting}, {cells.seeds_name(seed, split)}: EM "
            f"{100 * cell.scores['em'].mean():.1f}  Recall@5 "
            f"{100 * cell.scores['recall_at_5'].mean():.1f}  trained {cell.cost.seconds:.0f} s  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    if not (folder / "no_op.json").exists():
        change = no_op(comparison, *replicates(config)[0])
        (folder / "no_op.json").write_text(json.dumps({"largest_change": change}) + "\n")
    made = report(config, folder)
    written = made.write(folder)
    print(made.markdown())
    print(f"{folder}/: {' '.join(written)} and CSV files of all rows")
    return folder


if __name__ == "__main__":
    launch(run, "configs/compare_strategies.py")
