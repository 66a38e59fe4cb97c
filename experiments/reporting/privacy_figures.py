"""Figures of what training gives away."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.comparison import METRICS
from experiments.reporting.figures import COLORS, MARKERS, pyplot

ATTACKS = {
    "loss_auc": "questions, loss",
    "ratio_auc": "questions, likelihood ratio",
    "clients_auc": "clients",
    "update_auc": "questions of an update",
}


def over_epsilon(rows: Sequence[dict[str, Any]], metric: str):
    """Quality and the AUC of attacks by variant, those with an ε first and in its order: a Matplotlib
    figure, or None.

    Args:
      rows: `variant`, `epsilon` of some, the metric and AUCs with their `_low` and `_high`.
    """
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: row.get("epsilon") or np.inf)
    names = [
        row["variant"].replace("_", " ")
        + (f"\nε = {row['epsilon']:.3g}" if "epsilon" in row else "")
        for row in rows
    ]
    fig, (top, bottom) = pyplot().subplots(2, 1, figsize=(5.6, 4.4), sharex=True)
    _errorbars(top, rows, metric, 0.0, COLORS[0], MARKERS[0], "")
    top.set_ylabel(f"{METRICS[metric]} (%)")
    present = [name for name in ATTACKS if any(row.get(name) is not None for row in rows)]
    for i, name in enumerate(present):
        shift = 0.16 * (i - (len(present) - 1) / 2)
        _errorbars(bottom, rows, name, shift, COLORS[1 + i], MARKERS[1 + i], ATTACKS[name])
    bottom.axhline(0.5, color="#000000", lw=1, ls=":")
    bottom.set_ylabel("AUC of attacks")
    bottom.set_xticks(range(len(rows)), names, rotation=25)
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)
    fig.tight_layout()
    return fig


def _errorbars(ax, rows, name, shift, color, marker, label) -> None:
    there = [(x, row) for x, row in enumerate(rows) if row.get(name) is not None]
    y, low, high = (
        np.array([row[name + end] for _, row in there]) for end in ("", "_low", "_high")
    )
    ax.errorbar(
        np.array([x for x, _ in there]) + shift, y, yerr=[y - low, high - y], fmt=marker, ms=5,
        capsize=2, lw=1, color=color, label=label or None,
    )  # fmt: skip
