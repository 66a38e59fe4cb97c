"""Cells as tables: CSV for machines, Markdown for people."""

import csv
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_jax.evaluation.metrics import percent
from fedrag_jax.evaluation.significance import (
    bootstrap_interval,
    holm,
    paired_permutation_test,
    paired_t_test,
    seed_sd,
)
from fedrag_jax.tracking.cells import Cell
from fedrag_jax.tracking.ledger import Cost

COLUMNS = (
    "strategy", "setting", "alpha", "labels", "seeds", "em", "em_low", "em_high", "em_seed_sd", "f1",
    "recall_at_5", "mrr", "seconds", "flops", "bytes_up", "bytes_down", "own_topic_em",
    "flops_compiler", "compile_seconds",
)  # fmt: skip
NEEDS_LABELS = ("retriever", "independent")


def by_cell(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells of all seeds under (strategy, setting), in the order given."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.strategy, cell.setting), []).append(cell)
    return groups


def scores(cells: Sequence[Cell], metric: str) -> np.ndarray:
    """One metric of several seeds [seeds, Q], of the questions that have it."""
    found = np.stack([cell.scores[metric] for cell in cells])
    return found[:, ~np.isnan(found[0])]


def strategy_rows(cells: Sequence[Cell], alpha: float) -> list[dict[str, Any]]:
    """One row per strategy and setting; metrics in percent, costs as the mean over seeds.

    Rankings are scored over the questions with a gold passage; None where there is none.
    """
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        em = scores(group, "em")
        low, high = bootstrap_interval(em)
        cost = Cost(*np.mean([cell.cost for cell in group], axis=0))
        row = {
            "strategy": strategy,
            "setting": setting,
            "alpha": "" if setting == "centralised" else alpha,
            "labels": "yes" if strategy in NEEDS_LABELS else "no",
            "seeds": len(group),
            "em": percent(em),
            "em_low": 100 * low,
            "em_high": 100 * high,
            "em_seed_sd": None if (sd := seed_sd(em)) is None else 100 * sd,
            "seconds": cost.seconds,
            "compile_seconds": cost.compile_seconds,
            "flops": cost.flops,
            "flops_compiler": cost.flops_compiler,
            "bytes_up": int(cost.bytes_up),
            "bytes_down": int(cost.bytes_down),
        }
        for metric in ("f1", "recall_at_5", "mrr"):
            scored = scores(group, metric)
            row[metric] = percent(scored) if scored.size else None
        if "own_topic_em" in group[0].controls:
            row["own_topic_em"] = float(np.mean([c.controls["own_topic_em"] for c in group]))
        rows.append(row)
    return rows


def comparison_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Paired differences of EM and Recall@5: tuned against `none`, federated against local.

    p over questions by permutation and, from five seeds, over seeds by a paired t test; Holm over all
    permutation p values of the table.
    """
    groups = by_cell(cells)
    pairs = [
        ((strategy, setting), ("none", setting))
        for strategy, setting in groups
        if strategy != "none" and ("none", setting) in groups
    ]
    pairs += [
        ((strategy, "federated"), (strategy, "local"))
        for strategy, setting in groups
        if setting == "federated" and strategy != "none" and (strategy, "local") in groups
    ]
    rows = []
    for (one, other), metric in itertools.product(pairs, ("em", "recall_at_5")):
        a, b = scores(groups[one], metric), scores(groups[other], metric)
        if not a.size:
            continue
        low, high = bootstrap_interval(a.mean(0) - b.mean(0))
        rows.append(
            {
                "strategy": one[0],
                "setting": one[1],
                "against": f"{other[0]}, {other[1]}",
                "metric": metric,
                "difference": 100 * float((a.mean(0) - b.mean(0)).mean()),
                "low": 100 * low,
                "high": 100 * high,
                "p": paired_permutation_test(a, b),
                "p_t": paired_t_test(a, b),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]) if rows else (), strict=True):
        row["p_holm"] = float(p)
    return rows


def control_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Means over seeds of the controls of each strategy and setting."""
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        names = [name for name in group[0].controls if name != "own_topic_em"]
        if names:
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
        return f"{value:.1f}"

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, c) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
