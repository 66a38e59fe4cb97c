"""Cells as tables: CSV for machines, Markdown for people."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.evaluation.significance import (
    better_and_worse,
    bootstrap_interval,
    effect_size,
    holm,
    paired_permutation_test,
    paired_t_test,
    seed_sd,
)
from fedrag_jax.tracking.cells import Cell
from fedrag_jax.tracking.ledger import mean_cost

COLUMNS = (
    "strategy", "setting", "alpha", "labels", "seeds", "em", "em_low", "em_high", "em_seed_sd", "f1",
    "recall_at_5", "mrr", "seconds", "flops", "bytes_up", "bytes_down", "flops_compiler",
    "compile_seconds", "em_model_sd", "em_split_sd", "client_em_mean", "client_em_worst",
    "client_em_decile_1", "client_em_decile_9", "retrieve_seconds", "collate_seconds",
    "train_seconds", "aggregate_seconds", "embed_seconds", "evaluate_seconds", "peak_bytes", "tokens",
    "refreshes", "bytes_passages", "bytes_vectors", "bytes_questions",
)  # fmt: skip
NEEDS_LABELS = ("retriever", "independent")


def by_cell(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells of all pairs of seeds under (strategy, setting), in the order given."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.strategy, cell.setting), []).append(cell)
    return groups


def scores(cells: Sequence[Cell], metric: str) -> np.ndarray:
    """One metric of several seeds [seeds, Q], of the questions that have it."""
    found = np.stack([cell.scores[metric] for cell in cells])
    return found[:, ~np.isnan(found[0])]


def strategy_rows(cells: Sequence[Cell], alphas: dict[str, float]) -> list[dict[str, Any]]:
    """One row per strategy and setting; metrics in percent, costs as the mean over seeds.

    Rankings are scored over the questions with a gold passage; None where there is none.
    `em_model_sd` is the standard deviation over seeds of the model among runs with one split of
    clients, `em_split_sd` the other way round; None where there are no such runs. `client_em_*` are
    over clients, then means over seeds.

    Args:
      alphas: of the settings that have one.
    """
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        em = scores(group, "em")
        low, high = bootstrap_interval(em)
        cost = mean_cost([cell.cost for cell in group])
        row = {
            **{name: value for name, value in cost._asdict().items() if name != "traffic"},
            "strategy": strategy,
            "setting": setting,
            "alpha": alphas.get(setting, ""),
            "labels": "yes" if strategy in NEEDS_LABELS else "no",
            "seeds": len(group),
            "em": percent(em),
            "em_low": 100 * low,
            "em_high": 100 * high,
            "em_seed_sd": None if (sd := seed_sd(em)) is None else 100 * sd,
            "em_model_sd": _sd_within(group, lambda cell: cell.split),
            "em_split_sd": _sd_within(group, lambda cell: cell.seed),
            "bytes_up": int(cost.bytes_up),
            "bytes_down": int(cost.bytes_down),
        }
        for metric in ("f1", "recall_at_5", "mrr"):
            scored = scores(group, metric)
            row[metric] = percent(scored) if scored.size else None
        if all(cell.client_em for cell in group):
            for name, of in _OVER_CLIENTS.items():
                row[f"client_em_{name}"] = float(np.mean([of(cell.client_em) for cell in group]))
        rows.append(row)
    return rows


_OVER_CLIENTS = {
    "mean": np.mean,
    "worst": np.min,
    "decile_1": lambda em: np.quantile(em, 0.1),
    "decile_9": lambda em: np.quantile(em, 0.9),
}


def _sd_within(cells: Sequence[Cell], same) -> float | None:
    """Standard deviation of EM in points among cells of which `same` is the same, pooled."""
    together: dict[int, list[float]] = {}
    for cell in cells:
        together.setdefault(same(cell), []).append(percent(cell.scores["em"]))
    groups = [np.array(em) for em in together.values() if len(em) > 1]
    if not groups:
        return None
    squares = sum(((em - em.mean()) ** 2).sum() for em in groups)
    return float(np.sqrt(squares / sum(len(em) - 1 for em in groups)))


METRICS = ("em", "f1", "recall_at_5", "mrr")


def comparison_rows(
    cells: Sequence[Cell], metric: str, alphas: dict[str, float]
) -> list[dict[str, Any]]:
    """Paired differences of a metric in points: tuned against `none`, and settings against each other.

    Federated training is compared with centralised, and with local training of the same alpha. Runs
    are paired by their seeds. `effect` is Cohen's d_z; `better` and `worse` are percentages of
    questions. p is over questions by permutation, p_t over seeds by a paired t test, where there are
    five or more and no seed of model or split is there twice; `p_holm` and `p_t_holm` are adjusted
    over the rows, each by itself.
    """
    groups = by_cell(cells)
    tuned = [pair for pair in groups if pair[0] != "none"]
    pairs = [((s, where), ("none", where)) for s, where in tuned if ("none", where) in groups]
    pairs += [
        ((strategy, where), (strategy, other))
        for strategy, where in tuned
        for same, other in groups
        if same == strategy and _partners(where, other, alphas)
    ]
    rows = []
    for one, other in pairs:
        both = _paired(groups[one], groups[other])
        if not both:
            continue
        a, b = (scores(some, metric) for some in zip(*both, strict=True))
        if not a.size:
            continue
        low, high = bootstrap_interval(a.mean(0) - b.mean(0))
        better, worse = better_and_worse(a, b)
        rows.append(
            {
                "strategy": one[0],
                "setting": one[1],
                "against": f"{other[0]}, {other[1]}",
                "metric": metric,
                "difference": 100 * float((a.mean(0) - b.mean(0)).mean()),
                "low": 100 * low,
                "high": 100 * high,
                "effect": effect_size(a, b),
                "better": 100 * better,
                "worse": 100 * worse,
                "p": paired_permutation_test(a, b),
                "p_t": paired_t_test(a, b) if _independent([a for a, _ in both]) else None,
            }
        )
    for name in ("p", "p_t"):
        known = [row for row in rows if row[name] is not None]
        for row, p in zip(known, holm([row[name] for row in known]), strict=True):
            row[f"{name}_holm"] = float(p)
    return rows


def _partners(where: str, other: str, alphas: dict[str, float]) -> bool:
    local = other.startswith("local") and alphas.get(where) == alphas.get(other)
    return where.startswith("federated") and (other == "centralised" or local)


def _paired(some: Sequence[Cell], others: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    known = {(cell.seed, cell.split): cell for cell in others}
    return [(c, known[c.seed, c.split]) for c in some if (c.seed, c.split) in known]


def _independent(cells: Sequence[Cell]) -> bool:
    """Whether runs share neither a seed of the model nor one of the split, or all the same one."""
    count = len(cells)
    seeds, splits = (len({getattr(c, name) for c in cells}) for name in ("seed", "split"))
    return {seeds, splits} <= {1, count} and (seeds == count or splits == count)


def without_labels_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """What is left of the table where training questions have no gold passages."""
    lines = ["| strategy | setting | EM [95% CI] | Recall@5 | seconds |", "|---|---|---|---:|---:|"]
    for r in rows:
        if r["labels"] == "yes":
            lines.append(f"| {r['strategy']} | {r['setting']} | needs gold passages | – | – |")
        else:
            lines.append(
                f"| {r['strategy']} | {r['setting']} | {r['em']:.1f} [{r['em_low']:.1f}, "
                f"{r['em_high']:.1f}] | {_decimal(r['recall_at_5'])} | {r['seconds']:.1f} |"
            )
    return "\n".join(lines)


def clients_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """EM over clients, where it is known."""
    names = ("mean", "worst", "decile_1", "decile_9")
    lines = ["| strategy | setting | mean | worst client | 1st decile | 9th decile |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for r in rows:
        if "client_em_mean" in r:
            numbers = " | ".join(f"{r[f'client_em_{name}']:.1f}" for name in names)
            lines.append(f"| {r['strategy']} | {r['setting']} | {numbers} |")
    return "\n".join(lines)


def control_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Means over seeds of the controls of each strategy and setting."""
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        if names := list(group[0].controls):
            means = {n: float(np.mean([cell.controls[n] for cell in group])) for n in names}
            rows.append({"strategy": strategy, "setting": setting} | means)
    return rows


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Full precision; what a row lacks is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def strategies_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a paper."""
    lines = [
        "| strategy | setting | labels | EM [95% CI] | sd over seeds | F1 | Recall@5 | MRR@10 "
        "| seconds | TFLOP | MB up | MB down |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        sd = _decimal(r["em_seed_sd"])
        lines.append(
            f"| {r['strategy']} | {r['setting']} | {r['labels']} | {r['em']:.1f} "
            f"[{r['em_low']:.1f}, {r['em_high']:.1f}] | {sd} | {r['f1']:.1f} "
            f"| {_decimal(r['recall_at_5'])} | {_decimal(r['mrr'])} | {r['seconds']:.1f} "
            f"| {r['flops'] / 1e12:.2f} | {r['bytes_up'] / 1e6:.1f} | {r['bytes_down'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def costs_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Where the time goes, and what else a cell costs."""
    parts = ("retrieve", "collate", "train", "aggregate", "embed", "evaluate", "compile")
    lines = [
        f"| strategy | setting | {' | '.join(parts)} | TFLOP | by the compiler | peak MB | Mtokens "
        "| refreshes | MB up | MB down | MB passages | MB vectors |",
        "|---|---|" + "---:|" * (len(parts) + 9),
    ]
    for r in rows:
        seconds = " | ".join(f"{r[f'{part}_seconds']:.1f}" for part in parts)
        megabytes = " | ".join(
            f"{r[f'bytes_{what}'] / 1e6:.1f}" for what in ("up", "down", "passages", "vectors")
        )
        lines.append(
            f"| {r['strategy']} | {r['setting']} | {seconds} | {r['flops'] / 1e12:.2f} "
            f"| {r['flops_compiler'] / 1e12:.2f} | {r['peak_bytes'] / 1e6:.0f} "
            f"| {r['tokens'] / 1e6:.2f} | {r['refreshes']:.0f} | {megabytes} |"
        )
    return "\n".join(lines)


def traffic_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Bytes of what is trained, by direction, part and type: the mean over seeds."""
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        for kind, size in sorted(mean_cost([cell.cost for cell in group]).traffic.items()):
            (direction, kind), dtype = kind.rsplit(" ", 1)[0].split(" ", 1), kind.rsplit(" ", 1)[1]
            about = {"direction": direction, "part": kind, "dtype": dtype, "bytes": int(size)}
            rows.append({"strategy": strategy, "setting": setting} | about)
    return rows


def partitions_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Partitions, one a row: its name under `partition` beside `Partition.statistics`."""
    lines = [
        "| partition | clients | examples | least | median | most | Gini of sizes | classes "
        "| effective classes of a client | total variation |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['partition']} | {r['clients']} | {r['examples']} | {r['smallest']} "
            f"| {r['median']:.1f} | {r['largest']} | {r['size_gini']:.2f} | {r['classes']} "
            f"| {r['effective_classes']:.1f} | {r['total_variation']:.2f} |"
        )
    return "\n".join(lines)


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Any rows; numbers to one decimal, p values to three."""

    def cell(row, column):
        value = row.get(column)
        if value is None:
            return "–"
        if not isinstance(value, float):
            return str(value)
        if column.startswith("p"):
            return "<0.001" if value < 0.001 else f"{value:.3f}"
        if column == "effect":
            return f"{value:.2f}"
        return f"{value:.1f}"

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, c) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
