"""Figures of label-free fine-tuning."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.experiment_figures import LOOKS
from experiments.reporting.figures import legend, pyplot


def over_passages(rows: Sequence[dict[str, Any]], regime: str):
    """Answers and citations over the number of passages read, a line for each variant: a Matplotlib
    figure, or None.

    Args:
      rows: `variant`, `name`, `regime`, `passages`, `answer` and `citation` with `_low` and `_high`.
      regime: the one shown.
    """
    rows = [row for row in rows if row["regime"] == regime]
    counts = sorted({row["passages"] for row in rows})
    if len(counts) < 2:
        return None
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(7.0, 2.8))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for ax, metric, title in zip(
        axes, ("answer", "citation"), ("exact match (%)", "gold passage cited (%)"), strict=True
    ):
        for i, variant in enumerate(variants):
            some = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["passages"])
            color, marker = LOOKS[i % len(LOOKS)]
            y, low, high = (
                np.array([r[metric + end] for r in some]) for end in ("", "_low", "_high")
            )
            aside = 0.12 * (i - (len(variants) - 1) / 2)  # intervals beside each other
            ax.errorbar(
                [r["passages"] + aside for r in some], y, yerr=[y - low, high - y], marker=marker,
                ms=5, lw=1.2, capsize=2, color=color, ls="--" if i == 0 else "-",
                label=some[0]["name"],
            )  # fmt: skip
        ax.set_xticks(counts)
        ax.set_xlabel("passages read")
        ax.set_ylabel(title)
    handles, labels = legend(axes[None])
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig
