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

from experiments.cell_by_cell import write_report
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


def alphas_of(config) -> dict[str, float]:
    """Those of the settings that have one."""
    from fedrag_jax.strategies.settings import parse

    apart = [setting for setting in config.settings if setting != "centralised"]
    return {setting: parse(setting, config.federated.alpha)[1] for setting in apart}


def finished(config, folder: pathlib.Path) -> list:
    """All cells there are, setting by setting."""
    from fedrag_jax.tracking import cells

    asked = itertools.product(config.settings, config.strategies, replicates(config))
    found = (cells.load(folder, strategy, where, *pair) for where, strategy, pair in asked)
    return [cell for cell in found if cell]


def write_rows(config, folder: pathlib.Path, done: list) -> dict[str, list[dict]]:
    """Rows of every table by its name, all of them written as `<name>.csv`; `metrics.jsonl`."""
    from fedrag_jax.tracking import comparison
    from fedrag_jax.tracking.tables import write_csv

    alphas, primary = alphas_of(config), config.primary_metric
    compared = {
        metric: comparison.comparison_rows(done, metric, alphas)
        for metric in (primary, *(m for m in comparison.METRICS if m != primary))
    }
    rows = {
        "strategies": comparison.strategy_rows(done, alphas),
        "comparisons": [row for found in compared.values() for row in found],
        "against_independent": comparison.independent_rows(done),
        "controls": comparison.control_rows(done),
        "traffic": comparison.traffic_rows(done),
    }
    for name, some in rows.items():
        columns = comparison.COLUMNS if name == "strategies" else ()
        write_csv(folder / f"{name}.csv", some, columns)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for cell in done:
            where = {"strategy": cell.strategy, "setting": cell.setting}
            where |= {"seed": cell.seed, "split": cell.split}
            for task, rounds in cell.curves.items():
                for record in rounds:
                    file.write(json.dumps(where | {"task": task} | record) + "\n")
    return rows


def report(config, folder: pathlib.Path):
    """Writes the rows of all finished cells and returns the `Report` on them."""
    from fedrag_jax.tracking import comparison, figures
    from fedrag_jax.tracking import comparison_tables as tables
    from fedrag_jax.tracking.report import Report, Section

    done, primary = finished(config, folder), config.primary_metric
    found = write_rows(config, folder, done)
    rows = found["strategies"]
    compared = [row for row in found["comparisons"] if row["metric"] == primary]
    alphas = set(alphas_of(config).values())
    controlled = (
        "EM in percent without passages, with a distractor alone, with the gold passages alone."
    )
    if (no_op_file := folder / "no_op.json").exists():
        change = json.loads(no_op_file.read_text())["largest_change"]
        controlled += f" Training at learning rate zero changed scores by {change:.1f}."
    different = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
    split = f", Dirichlet alpha {different} over {config.federated.column}" if alphas else ""
    sections = [
        Section(
            "At a glance",
            "glance",
            "Exact match in percent with its 95% bootstrap interval over test questions.",
            tables.glance_table(rows),
        ),
        Section(
            "Strategies",
            "strategies",
            "Metrics in percent, EM with its 95% bootstrap interval over test questions and its "
            "standard deviation over seeds; seconds of training, retrieval and index refresh, elapsed, "
            "over all cores or devices.",
            tables.strategies_table(rows),
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
            tables.without_labels_table(rows),
        ),
        Section(
            f"Paired comparisons of {comparison.METRICS[primary]}, the primary metric",
            "comparisons",
            "Difference in points with its 95% interval; Cohen's d_z; percent of questions that are "
            "better and worse; p by permutation over questions, which is what claims rest on, and from "
            "five seeds p over seeds, each Holm-adjusted over this table. Other metrics, each adjusted "
            "by itself, are in comparisons.csv.",
            tables.comparisons_table(compared),
        ),
        Section(
            "Against independent tuning",
            "against_independent",
            "Differences in points from independent tuning in the same setting, paired by question and "
            "seed, each metric Holm-adjusted over this table; seconds and operations as multiples of "
            "its own, the mean over seeds.",
            tables.independent_table(found["against_independent"]),
        ),
        Section(
            "Time by part",
            "times",
            "Seconds, mean over seeds, summed over clients in the local setting. Collating includes "
            "likelihoods under a frozen generator, aggregation all of a round that is no local step; "
            "passages are embedded once. A program is compiled for the first cell that needs it.",
            tables.times_table(rows),
        ),
        Section(
            "Costs",
            "costs",
            "Operations of training steps, by formula and by the compiler; memory of the largest round "
            "on a device; tokens read in training; bytes of what is trained, and of the corpus and its "
            "index on their way to the clients.",
            tables.costs_table(rows),
        ),
        Section(
            "Traffic",
            "traffic",
            "What is trained on its way between clients and server, by part and type.",
            tables.traffic_table(found["traffic"]),
        ),
        Section(
            "Clients",
            "clients",
            "EM of the model each client would use, on questions such as it holds.",
            tables.clients_table(rows),
        ),
        Section(
            "Controls",
            "controls",
            controlled,
            tables.controls_table(found["controls"]),
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
    return write_report(report(config, folder), folder, "CSV files of all rows and")


if __name__ == "__main__":
    launch(run, "configs/compare_strategies.py")
