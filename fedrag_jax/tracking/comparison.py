"""What finished cells come to: rows of the comparison of strategies."""

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
        row = {
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
            **costs_and_clients(group),
        }
        for metric in ("f1", "recall_at_5", "mrr"):
            scored = scores(group, metric)
            row[metric] = percent(scored) if scored.size else None
        rows.append(row)
    return rows


def costs_and_clients(cells: Sequence[Cell]) -> dict[str, Any]:
    """The part of a row that is costs, means over seeds, and `client_em_*`."""
    cost = mean_cost([cell.cost for cell in cells])
    row = {name: value for name, value in cost._asdict().items() if name != "traffic"}
    row |= {"bytes_up": int(cost.bytes_up), "bytes_down": int(cost.bytes_down)}
    if all(cell.client_em for cell in cells):
        for name, of in _OVER_CLIENTS.items():
            row[f"client_em_{name}"] = float(np.mean([of(cell.client_em) for cell in cells]))
    return row


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


METRICS = {"em": "EM", "f1": "F1", "recall_at_5": "Recall@5", "mrr": "MRR@10"}


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
        about = {"strategy": one[0], "setting": one[1], "against": f"{other[0]}, {other[1]}"}
        if found := paired_difference(groups[one], groups[other], metric):
            rows.append(about | {"metric": metric} | found)
    adjust(rows)
    return rows


def paired_difference(
    some: Sequence[Cell], others: Sequence[Cell], metric: str, unit: float = 100.0
) -> dict[str, Any] | None:
    """One such row, without names and adjustment; None where no runs or no questions are in common.

    Differences of scores are multiplied by `unit`: those of shares become points.
    """
    both = _paired(some, others)
    if not both:
        return None
    a, b = (scores(cells, metric) for cells in zip(*both, strict=True))
    if not a.size:
        return None
    low, high = bootstrap_interval(a.mean(0) - b.mean(0))
    better, worse = better_and_worse(a, b)
    return {
        "difference": unit * float((a.mean(0) - b.mean(0)).mean()),
        "low": unit * low,
        "high": unit * high,
        "effect": effect_size(a, b),
        "better": 100 * better,
        "worse": 100 * worse,
        "p": paired_permutation_test(a, b),
        "p_t": paired_t_test(a, b) if _independent([a for a, _ in both]) else None,
    }


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `p_holm` and `p_t_holm`, adjusted over the rows (Holm 1979)."""
    for name in ("p", "p_t"):
        known = [row for row in rows if row[name] is not None]
        for row, p in zip(known, holm([row[name] for row in known]), strict=True):
            row[f"{name}_holm"] = float(p)


def independent_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every tuned strategy against `independent` in its setting: what Lawton et al. 2025 compare.

    `em_*` and `recall_at_5_*` are as in `comparison_rows`, each metric adjusted by itself;
    `seconds_ratio` and `flops_ratio` are means over pairs of runs with the same seeds, between `_low`
    and `_high`, the least and the most.
    """
    groups, rows, found = by_cell(cells), [], {"em": [], "recall_at_5": []}
    for (strategy, setting), group in groups.items():
        usual = groups.get(("independent", setting), [])
        both = _paired(group, usual) if strategy not in ("none", "independent") else []
        if not both:
            continue
        row = {"strategy": strategy, "setting": setting}
        for name in ("seconds", "flops"):
            ratios = [getattr(a.cost, name) / getattr(b.cost, name) for a, b in both]
            row |= {f"{name}_ratio": float(np.mean(ratios))}
            row |= {f"{name}_ratio_low": min(ratios), f"{name}_ratio_high": max(ratios)}
        for metric, others in found.items():
            if one := paired_difference(group, usual, metric):
                others.append((row, one))
        rows.append(row)
    for metric, pairs in found.items():
        adjust([one for _, one in pairs])
        for row, one in pairs:
            row |= {f"{metric}_{name}": value for name, value in one.items()}
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


def control_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Means over seeds of the controls of each strategy and setting."""
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        if names := list(group[0].controls):
            means = {n: float(np.mean([cell.controls[n] for cell in group])) for n in names}
            rows.append({"strategy": strategy, "setting": setting} | means)
    return rows


def traffic_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Bytes of what is trained, by direction, part and type: the mean over seeds."""
    rows = []
    for (strategy, setting), group in by_cell(cells).items():
        for kind, size in sorted(mean_cost([cell.cost for cell in group]).traffic.items()):
            direction, *part, dtype = kind.split(" ")
            about = {"direction": direction, "part": " ".join(part), "dtype": dtype}
            rows.append({"strategy": strategy, "setting": setting} | about | {"bytes": int(size)})
    return rows
