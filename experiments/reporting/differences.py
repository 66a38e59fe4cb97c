"""Paired differences between cells of a comparison, with intervals and tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reporting.cells import Cell
from experiments.reporting.comparison import METRICS, by_cell, estimate, scores
from fedrag_jax.evaluation.significance import (
    better_and_worse,
    bootstrap_interval,
    effect_size,
    equivalence_test,
    holm,
    paired_permutation_test,
    paired_t_test,
    seed_sd,
)


def comparison_rows(
    cells: Sequence[Cell], metric: str, regimes: Mapping[str, Any], margin: float
) -> list[dict[str, Any]]:
    """Returns paired differences of a metric in points: tuned against `none`, and between regimes.

    Federated training is compared with centralised training of the same budget, with local training
    of the same alpha and either budget, and by an algorithm of its own with the config's. Runs are
    paired by their seeds. `effect` is Cohen's d_z; `better` and `worse` are percentages of questions.
    p is over questions by permutation of clusters, p_t over seeds by a paired t test, if there are at
    least five and no model or split seed repeats, p_e of equivalence within the margin;
    `p_holm`, `p_t_holm` and `p_e_holm` are adjusted over the rows, each by itself.

    Args:
      regimes: the parsed `strategies.regimes.Regime` of each name.
      margin: equivalence margin, in points.
    """
    groups = by_cell(cells)
    tuned = [pair for pair in groups if pair[0] != "none"]
    pairs = [((s, where), ("none", where)) for s, where in tuned if ("none", where) in groups]
    pairs += [
        ((strategy, where), (strategy, other))
        for strategy, where in tuned
        for same, other in groups
        if same == strategy and _partners(regimes[where], regimes[other])
    ]
    rows = []
    for one, other in pairs:
        about = {"strategy": one[0], "regime": one[1], "against": f"{other[0]}, {other[1]}"}
        if found := paired_difference(groups[one], groups[other], metric, margin=margin):
            rows.append(about | {"metric": metric} | found)
    adjust(rows)
    return rows


def paired_difference(
    some: Sequence[Cell],
    others: Sequence[Cell],
    metric: str,
    unit: float = 100.0,
    margin: float | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Returns one row without names and adjustment; nothing without common runs or questions.

    Differences of scores are multiplied by `unit`: those of shares become points. `sd` is their
    standard deviation over seeds.

    Args:
      margin: equivalence margin, in `unit`; without one there is no `p_e`.
      prefix: prefix of the row's keys.
    """
    both = _paired(some, others)
    if not both:
        return {}
    one, other = (scores(cells, metric) for cells in zip(*both, strict=True))
    if not one.values.size:
        return {}
    a, b, about = one.values, other.values, (one.clusters, one.weights)
    low, high = bootstrap_interval(a - b, *about)
    better, worse = better_and_worse(a, b)
    sd = seed_sd(a - b, one.weights)
    equivalent = {} if margin is None else {"p_e": equivalence_test(a, b, margin / unit, *about)}
    a, b = one.weights * a, one.weights * b  # weights have a mean of 1
    found = {
        "difference": unit * float((one.means - other.means).mean()),
        "low": unit * low,
        "high": unit * high,
        "sd": None if sd is None else unit * sd,
        "effect": effect_size(a, b),
        "better": 100 * better,
        "worse": 100 * worse,
        "p": paired_permutation_test(a, b, one.clusters),
        "p_t": paired_t_test(a, b) if _independent([a for a, _ in both]) else None,
        **equivalent,
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def adjust(rows: Sequence[dict[str, Any]], prefix: str = "") -> None:
    """Adds `p_holm`, `p_t_holm` and `p_e_holm`, adjusted over the rows that have them (Holm 1979).

    Args:
      prefix: prefix of these names, and of the p that are adjusted.
    """
    for name in (f"{prefix}{p}" for p in ("p", "p_t", "p_e")):
        known = [row for row in rows if row.get(name) is not None]
        for row, p in zip(known, holm([row[name] for row in known]), strict=True):
            row[f"{name}_holm"] = float(p)


def independent_rows(cells: Sequence[Cell], margin: float) -> list[dict[str, Any]]:
    """Returns every tuned strategy against `independent` in its regime, as Lawton et al. 2025 compare.

    `em_*` and so on are as in `comparison_rows`, each metric adjusted by itself; `seconds_ratio` and
    `flops_ratio` are means over pairs of runs with the same seeds, between `_low` and `_high`, the
    least and the most.

    Args:
      margin: equivalence margin, in points.
    """
    groups, rows = by_cell(cells), []
    for (strategy, regime), group in groups.items():
        usual = groups.get(("independent", regime), [])
        both = _paired(group, usual) if strategy not in ("none", "independent") else []
        if not both:
            continue
        row = {"strategy": strategy, "regime": regime}
        for name in ("seconds", "flops"):
            known = [[getattr(cell.cost, name) for cell in pair] for pair in both]
            if any(cost is None for pair in known for cost in pair):
                continue  # what an objective does not declare
            ratios = [a / b for a, b in known]
            row |= {f"{name}_ratio": float(np.mean(ratios))}
            row |= {f"{name}_ratio_low": min(ratios), f"{name}_ratio_high": max(ratios)}
        for metric in METRICS:
            row |= paired_difference(group, usual, metric, margin=margin, prefix=f"{metric}_")
        rows.append(row)
    for metric in METRICS:
        adjust(rows, f"{metric}_")
    return rows


def _partners(where, other) -> bool:
    if where.kind != "federated":
        return False
    if other.kind == "local":
        return where.alpha == other.alpha
    alike = where.converged == other.converged
    if other.kind == "centralised":
        return alike
    return alike and where.alpha == other.alpha and bool(where.algorithm) > bool(other.algorithm)


def headline_rows(
    cells: Sequence[Cell], metric: str, regimes: Mapping[str, Any], alpha: float
) -> list[dict[str, Any]]:
    """Returns each strategy's gain by federation over a lone client, and the part that is compute.

    A lone client is limited by its data, not by the length of a round: federated training is compared
    with the better of `local` and `local_converged`, by the metric itself, which favours the lone
    client. `compute` are the points a lone client gains by training until it stops improving,
    `data` what federated training has over that. Where lone clients train until they stop improving,
    a strategy of which they do not is left out: its lone clients were stopped early.

    A row is of one algorithm at its longest budget: `federated_converged` where it was trained, so that
    no federated regime is chosen by its score. All values are over the pairs of seeds that the compared
    regimes share.

    Args:
      metric: the compared metric, such as "em" or "own_em".
      regimes: the parsed `strategies.regimes.Regime` of each name.
      alpha: α of the clients; regimes of other splits are left out.
    """
    groups, rows = by_cell(cells), []

    def named(strategy, kind):
        there = [where for name, where in groups if name == strategy]
        return [w for w in there if (regimes[w].kind, regimes[w].alpha) == (kind, alpha)]

    patient = {
        name for name, _ in groups if any(regimes[w].converged for w in named(name, "local"))
    }
    for strategy in dict.fromkeys(name for name, _ in groups if name != "none"):
        if patient and strategy not in patient:
            continue
        # The last of an algorithm is its converged regime, if it has one.
        order = sorted(named(strategy, "federated"), key=lambda w: regimes[w].converged)
        for federated in {regimes[w].algorithm: w for w in order}.values():
            alone = [
                where
                for where in named(strategy, "local")
                if _paired(groups[strategy, federated], groups[strategy, where])
            ]
            shared = _common([groups[strategy, where] for where in (federated, *alone)])
            if not alone or not shared[0]:
                continue
            together, *local = shared
            known = dict(zip(alone, local, strict=True))
            best = max(alone, key=lambda w: float(scores(known[w], metric).means.mean()))
            found = paired_difference(together, known[best], metric)
            if not found:
                continue
            row = {"metric": metric, "strategy": strategy, "regime": federated, "against": best}
            row |= estimate(known[best], metric, "local")
            row |= estimate(together, metric, "federated") | found
            matched = [w for w in alone if not regimes[w].converged]
            if matched and regimes[best].converged:
                longer = paired_difference(known[best], known[matched[0]], metric)
                row |= {"compute": longer["difference"], "data": row["difference"]}
            rows.append(row)
    adjust(rows)
    return rows


def _common(groups: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Returns the cells of each group with the pairs of seeds that all groups have."""
    shared = set.intersection(*({(c.seed, c.split) for c in cells} for cells in groups))
    return [[c for c in cells if (c.seed, c.split) in shared] for cells in groups]


def _paired(some: Sequence[Cell], others: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    known = {(cell.seed, cell.split): cell for cell in others}
    return [(c, known[c.seed, c.split]) for c in some if (c.seed, c.split) in known]


def _independent(cells: Sequence[Cell]) -> bool:
    """Whether runs share neither a seed of the model nor one of the split, or all the same one."""
    count = len(cells)
    seeds, splits = (len({getattr(c, name) for c in cells}) for name in ("seed", "split"))
    return {seeds, splits} <= {1, count} and (seeds == count or splits == count)
