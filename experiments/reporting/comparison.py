"""Aggregates finished cells to rows of the comparison of strategies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reporting.cells import Cell
from fedrag_jax.evaluation.significance import bootstrap_interval, seed_means, seed_sd
from fedrag_jax.tracking.ledger import mean_cost

COLUMNS = (
    "strategy", "regime", "alpha", "labels", "seeds", "em", "em_low", "em_high", "em_sd", "f1",
    "recall_at_5", "mrr", "epochs", "at_cap", "seconds", "device_seconds", "search_seconds", "flops",
    "bytes_up", "bytes_down", "flops_compiler",
    "compile_seconds", "em_model_sd", "em_split_sd", "client_em_mean", "client_em_worst",
    "client_em_decile_1", "client_em_decile_9", "client_em_mean_against", "client_em_worst_against",
    "retrieve_seconds", "collate_seconds",
    "train_seconds", "aggregate_seconds", "embed_seconds", "evaluate_seconds", "peak_bytes", "tokens",
    "refreshes", "bytes_passages", "bytes_vectors", "bytes_questions", "validate_seconds",
    *(f"{metric}_{name}" for metric in ("f1", "recall_at_5", "mrr") for name in ("low", "high", "sd")),
    *(
        f"own_{metric}{name}"
        for metric in ("em", "f1", "recall_at_5", "mrr")
        for name in ("", "_low", "_high", "_sd")
    ),
)  # fmt: skip
METRICS = {"em": "EM", "f1": "F1", "recall_at_5": "Recall@5", "mrr": "MRR@10"}


def by_cell(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Groups cells of all pairs of seeds by (strategy, regime), in the given order."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.strategy, cell.regime), []).append(cell)
    return groups


class Scores(NamedTuple):
    """One metric of several seeds.

    Attributes:
      values: [seeds, Q] of the questions that have it.
      clusters: [Q].
      weights: [seeds, Q], how much a question counts.
    """

    values: np.ndarray
    clusters: np.ndarray
    weights: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """[seeds]; NaN where no question has the metric."""
        if not self.values.size:
            return np.full(len(self.values), np.nan)
        return seed_means(self.values, self.weights)


def scores(cells: Sequence[Cell], metric: str) -> Scores:
    """One metric of several seeds; on clients' own topics questions count as often as clients ask.

    Where none of a seed's clients asks any question, none has the metric.
    """
    found = np.stack([cell.scores[metric] for cell in cells])
    scored = ~np.isnan(found).any(axis=0)
    weights = np.ones_like(found)
    if metric.startswith(own("")):
        weights = np.stack([cell.scores[own_weight(metric)] for cell in cells])
        scored &= weights.any(axis=0) & weights.any(axis=1).all()
    return Scores(found[:, scored], cells[0].clusters[scored], weights[:, scored])


def estimate(
    cells: Sequence[Cell], metric: str, name: str = "", unit: float = 100.0
) -> dict[str, float | None]:
    """Returns `<name>`, `<name>_low`, `<name>_high`, `<name>_sd`: a mean, its two-level 95% interval,
    and its standard deviation over seeds; None if no question has the metric, or for a single seed.

    Args:
      name: the name in the row; default: the metric's name.
      unit: factor of the values; 100 converts shares to percent.
    """
    name, found = name or metric, scores(cells, metric)
    if not found.values.size:
        return dict.fromkeys([name, *(f"{name}_{part}" for part in ("low", "high", "sd"))])
    low, high = bootstrap_interval(*found)
    sd = seed_sd(found.values, found.weights)
    return {
        name: unit * float(found.means.mean()),
        f"{name}_low": unit * low,
        f"{name}_high": unit * high,
        f"{name}_sd": None if sd is None else unit * sd,
    }


def strategy_rows(cells: Sequence[Cell], regimes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one row per strategy and regime; metrics in percent, costs as the mean over seeds.

    Every metric comes with `_low`, `_high` and `_sd` as of `estimate`, and as `own_<metric>` on
    questions such as each client holds. Rankings are scored over the questions with a gold passage;
    None where there is none. `epochs` says how often each task's model saw the training examples,
    task by task; `at_cap` how many of the trainings that validation should have ended met their cap.
    `em_model_sd` is the standard deviation over seeds of the model among runs with one split of
    clients, `em_split_sd` the other way round; None where there are no such runs. `client_em_*` are
    over clients, then means over seeds; `client_em_*_against` are differences from the strategy's
    centralised model on the same mixtures, over the pairs of seeds that both have.

    Args:
      regimes: the parsed `strategies.regimes.Regime` of each name.
    """
    rows, groups = [], by_cell(cells)
    for (strategy, regime), group in groups.items():
        row = {
            "strategy": strategy,
            "regime": regime,
            "alpha": "" if regimes[regime].kind == "centralised" else regimes[regime].alpha,
            "labels": _labels(strategy),
            "seeds": len(group),
            "em_model_sd": _sd_within(group, lambda cell: cell.split),
            "em_split_sd": _sd_within(group, lambda cell: cell.seed),
            **costs_and_clients(group),
            **clients_against(group, groups.get((strategy, "centralised"), ())),
        }
        for metric in METRICS:
            row |= estimate(group, metric)
            if own(metric) in group[0].scores:
                row |= estimate(group, own(metric))
        rows.append(row)
    return rows


def own(metric: str) -> str:
    """Returns the name of a metric on clients' own topics."""
    return f"own_{metric}"


def own_weight(metric: str) -> str:
    """Under which name cells have how much questions count for it: some metrics lack some questions."""
    return f"weight_of_{metric}"


def _labels(strategy: str) -> str | None:
    """Whether it needs gold passages; None of one that is in no table."""
    from fedrag_jax.strategies.strategies import STRATEGIES  # imports JAX

    row = STRATEGIES.get(strategy)
    return row and ("yes" if row.needs_gold else "no")


def costs_and_clients(cells: Sequence[Cell]) -> dict[str, Any]:
    """The part of a row that is costs, means over seeds, and `client_em_*`."""
    cost = mean_cost([cell.cost for cell in cells])
    row = {name: value for name, value in cost._asdict().items() if name != "traffic"}
    row |= {"bytes_up": int(cost.bytes_up), "bytes_down": int(cost.bytes_down)}
    row |= epochs_of(cells)
    if all(cell.client_em for cell in cells):
        for name, of in _OVER_CLIENTS.items():
            row[f"client_em_{name}"] = float(np.mean([of(cell.client_em) for cell in cells]))
    return row


def clients_against(cells: Sequence[Cell], usual: Sequence[Cell]) -> dict[str, float]:
    """Returns the differences of two `client_em_*` from other cells with the same pairs of seeds."""
    known = {(cell.seed, cell.split): cell.client_em for cell in usual}
    pairs = [(cell.client_em, known.get((cell.seed, cell.split))) for cell in cells]
    pairs = [(em, other) for em, other in pairs if em and other]
    if not pairs:
        return {}
    return {
        f"client_em_{name}_against": float(np.mean([of(em) - of(other) for em, other in pairs]))
        for name, of in _OVER_CLIENTS.items()
        if name in ("mean", "worst")
    }


def epochs_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """`epochs` of the models that were kept, "0.5" or "0.5 + 1.9" task by task; `at_cap`, how many of
    the trainings that validation should have ended were best at their cap, such as "1 of 10"."""
    seen: dict[str, list[float]] = {}
    ends = [(task, points[-1]) for cell in cells for task, points in cell.curves.items()]
    for task, end in ends:
        if "epochs" in end:
            seen.setdefault(task, []).append(end.get("kept_epochs", end["epochs"]))
    row = {"epochs": " + ".join(f"{np.mean(found):.1f}" for found in seen.values()) or None}
    if stopped := [end for _, end in ends if "at_cap" in end]:
        at_cap, trainings = (sum(end[name] for end in stopped) for name in ("at_cap", "trainings"))
        row["at_cap"] = f"{at_cap} of {trainings}"
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
        together.setdefault(same(cell), []).append(100 * np.nanmean(cell.scores["em"]))
    groups = [np.array(em) for em in together.values() if len(em) > 1]
    if not groups:
        return None
    squares = sum(((em - em.mean()) ** 2).sum() for em in groups)
    return float(np.sqrt(squares / sum(len(em) - 1 for em in groups)))


def control_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Returns the means over seeds of the controls of each strategy and regime."""
    rows = []
    for (strategy, regime), group in by_cell(cells).items():
        if means := control_means(group):
            rows.append({"strategy": strategy, "regime": regime} | means)
    return rows


def control_means(cells: Sequence[Cell]) -> dict[str, float]:
    """Means over seeds of the controls that cells of one kind have."""
    return {n: float(np.mean([cell.controls[n] for cell in cells])) for n in cells[0].controls}


def traffic_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Returns the bytes of trained parameters by direction, part and type: the mean over seeds."""
    rows = []
    for (strategy, regime), group in by_cell(cells).items():
        for kind, size in sorted(mean_cost([cell.cost for cell in group]).traffic.items()):
            direction, *part, dtype = kind.split(" ")
            about = {"direction": direction, "part": " ".join(part), "dtype": dtype}
            rows.append({"strategy": strategy, "regime": regime} | about | {"bytes": int(size)})
    return rows
