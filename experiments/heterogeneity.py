"""Federated fine-tuning over kinds of federation: skew, clients, local steps, participation.

    python -m experiments.heterogeneity --config=configs/heterogeneity.py

Results go to runs/<name>/: heterogeneity.csv, table.md, report.html, figures. A point (values of all
factors) has a folder of its own below points/; what is finished there is not computed again.
"""

import itertools
import json
import pathlib
import time

import numpy as np

from experiments.comparison import Comparison, compute_cell
from experiments.inputs import (
    check,
    load_data,
    replicates,
    trainable_strategies,
    warn_of_borrowed_rates,
)
from experiments.launch import launch, settled_config
from fedrag_jax.errors import ConfigError, DivergenceError

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


def points(config) -> list[tuple[str, float]]:
    """(factor, value) of every point, in order of value, that of the rest of the config included."""
    found = []
    for factor, (room, name) in WHERE.items():
        if values := config.factors[factor]:
            found += [(factor, value) for value in sorted({*values, config[room][name]})]
    return found


def at_point(config, factor: str, value: float):
    """The config with one value changed, and as many rounds as leave the number of examples alone.

    Raises:
      ConfigError: that would not be a whole number of rounds.
    """
    changed, (room, name) = config.copy_and_resolve_references(), WHERE[factor]
    changed[room][name] = type(config[room][name])(value)

    def steps(c):
        return c.federated.clients * c.training.local_steps

    work = config.training.rounds * steps(config)
    if work % steps(changed):
        raise ConfigError(
            f"config.factors.{factor}: {value:g} leaves {work / steps(changed):g} rounds; clients x "
            f"local_steps must divide {work}"
        )
    changed.training.rounds = work // steps(changed)
    return changed


def point_name(config) -> str:
    """The folder of a point."""
    f = config.federated
    steps, rounds = config.training.local_steps, config.training.rounds
    return f"alpha{f.alpha:g}-clients{f.clients}-steps{steps}x{rounds}-part{f.participation:g}"


def scaled(run: Comparison, factor: float) -> Comparison:
    """The same point at other learning rates."""
    config = run.config.copy_and_resolve_references()
    for rates in config.learning_rates.values():
        for part in rates:
            rates[part] *= factor
    return run.like(config, run.folder / f"rates-x{factor:g}")


def best_rates(run: Comparison, strategy: str) -> Comparison:
    """The point at the rates that serve a strategy best on validation questions, first seed."""
    from fedrag_jax.evaluation.evaluator import evaluate

    config, path = run.config, run.folder / f"rates-{strategy}.json"
    if not path.exists():
        metric = "mrr" if strategy == "retriever" else config.primary_metric
        some = run.dataset.validation[: config.validation_questions]
        found = {}
        for factor in config.rate_factors:
            try:
                systems, _ = scaled(run, factor).tuned_systems(
                    strategy, "federated", *replicates(config)[0]
                )
            except DivergenceError as error:
                print(f"{point_name(config)}: {strategy} at x{factor:g}: {error}")
                continue
            found[factor] = 100 * float(np.nanmean(evaluate(systems[0], some)[metric]))
        if not found:
            raise ConfigError(
                f"{strategy} at {point_name(config)}: training diverged at all of "
                f"config.rate_factors {config.rate_factors}; add smaller ones"
            )
        best = max(found, key=found.__getitem__)
        run.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"factor": best, "metric": metric, "validation": found}) + "\n")
    return scaled(run, json.loads(path.read_text())["factor"])


def finished(config, folder: pathlib.Path, strategy: str):
    """(factor of the rates, finished cells) of a strategy at a point."""
    from fedrag_jax.tracking import cells

    here, chosen = folder / "points" / point_name(config), 1.0
    if strategy != "none":
        path = here / f"rates-{strategy}.json"
        if not path.exists():
            return None, []
        chosen = json.loads(path.read_text())["factor"]
        here = here / f"rates-x{chosen:g}"
    some = (cells.load(here, strategy, "federated", *pair) for pair in replicates(config))
    return chosen, [cell for cell in some if cell]


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """A row for every point and strategy, with its difference from the point of the config."""
    from fedrag_jax.tracking import comparison

    rows = []
    for factor, value in points(config):
        here, (room, name) = at_point(config, factor, value), WHERE[factor]
        for strategy in config.strategies:
            chosen, cells = finished(here, folder, strategy)
            if not cells:
                continue
            (row,) = comparison.strategy_rows(cells, {"federated": here.federated.alpha})
            row |= {"factor": factor, "value": value, "rounds": here.training.rounds}
            row |= {"rate_factor": chosen}
            if strategy != "none" and value != config[room][name]:
                _, usual = finished(config, folder, strategy)
                row |= comparison.paired_difference(cells, usual, config.primary_metric) or {}
            rows.append(row)
    comparison.adjust([row for row in rows if "p" in row])
    return rows


def report(config, folder: pathlib.Path):
    """Writes heterogeneity.csv and returns the `Report`."""
    from fedrag_jax.tracking import figures
    from fedrag_jax.tracking.report import Report, Section
    from fedrag_jax.tracking.tables import (
        Column,
        Table,
        interval,
        number,
        p_value,
        words,
        write_csv,
    )

    rows = rows_of(config, folder)
    first = ("factor", "value", "strategy", "seeds", "em", "em_low", "em_high")
    others = (name for row in rows for name in row)
    write_csv(folder / "heterogeneity.csv", rows, list(dict.fromkeys([*first, *others])))

    def difference(row):
        if "difference" not in row:
            return "–"
        return f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"

    columns = (
        words("factor", "factor"),
        Column("value", lambda row: f"{row['value']:g}".replace("inf", "∞")),
        words("strategy", "strategy"),
        number("rounds", "rounds", 0),
        number("rates ×", "rate_factor", 2),
        interval("EM [95% CI]", "em"),
        number("sd over seeds", "em_seed_sd"),
        number("Recall@5", "recall_at_5"),
        Column("against the usual [95% CI]", difference),
        p_value("p", "p_holm"),
        number("worst client", "client_em_worst"),
        number("seconds", "seconds"),
        number("MB up", "bytes_up", 1, 1e6),
    )
    f, t = config.federated, config.training
    usual = (
        f"α = {f.alpha:g}, {f.clients} clients, {t.rounds} rounds of {t.local_steps} local steps, "
        f"{100 * f.participation:g}% of the clients in each"
    )
    open_marks = {factor: config[room][name] for factor, (room, name) in WHERE.items()}
    return Report(
        folder.name,
        f"Federated fine-tuning on {config.data.name}, one factor varied at a time around {usual}; "
        "every point trains on as many examples.",
        [
            Section(
                "Figure",
                "heterogeneity",
                "Exact match with its 95% interval over test questions. The dotted line is the untuned "
                "system, the open mark the usual point.",
                figure=figures.over_factors(rows, NAMES, open_marks),
            ),
            Section(
                "Points",
                "points",
                "EM with its 95% bootstrap interval over test questions; the difference from the usual "
                "point is paired by question and seed, p by permutation, Holm-adjusted over this "
                "table; learning rates are those of the config times a factor that validation "
                "questions chose.",
                Table(columns, rows),
            ),
        ],
    )


def run(config, runs: str) -> pathlib.Path:
    """Every point; returns the folder of the results."""
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.weights_and_biases import log_cell

    began, folder = time.perf_counter(), pathlib.Path(runs) / config.name
    dataset = load_data(config)
    check(config)
    if tuple(config.settings) != ("federated",):
        raise ConfigError(f"config.settings must be ('federated',) here, got {config.settings}")
    warn_of_borrowed_rates(config)
    at = {point_name(c): c for c in (at_point(config, *point) for point in points(config))}
    if not at:
        raise ConfigError("config.factors: all are empty; give some values to one of them")
    for point in at.values():
        check(point)
    whole = Comparison(config, dataset, folder)
    runs_at = [whole.like(c, folder / "points" / name) for name, c in at.items()]
    for there, (_, split) in itertools.product(runs_at, replicates(config)):
        there.clients("federated", split)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("seeds", "split_seeds", "strategies", "factors", "wandb"))
    write_manifest(folder, dataset, experiment="heterogeneity", seeds=list(config.seeds))
    todo = list(itertools.product(runs_at, trainable_strategies(config, dataset)))
    for i, (point, strategy) in enumerate(todo, 1):
        there = point if strategy == "none" else best_rates(point, strategy)
        for seed, split in replicates(config):
            if cells.load(there.folder, strategy, "federated", seed, split):
                continue
            cell = compute_cell(there, strategy, "federated", seed, split, controls=False)
            cells.save(there.folder, cell)
            about, wandb = there.config.to_dict(), config.wandb
            log_cell(cell, folder, config.name, wandb.mode, wandb.project, about)
        _, done = finished(point.config, folder, strategy)
        em = 100 * np.mean([cell.scores["em"].mean() for cell in done])
        print(
            f"[{i}/{len(todo)}] {strategy}, {point.folder.name}: EM {em:.1f} over {len(done)} seeds  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    made = report(config, folder)
    written = made.write(folder)
    print(made.markdown())
    print(f"{folder}/: heterogeneity.csv {' '.join(written)}")
    return folder


if __name__ == "__main__":
    launch(run, "configs/heterogeneity.py")
