"""Figures of a policy that learns to search, with its signs of collapse."""

from collections.abc import Sequence

import numpy as np

from experiments.reporting.cells import Cell
from experiments.reporting.figures import OTHER_STYLES, REGIME_STYLES, legend, panels, regime_name

METRICS = {
    "reward": "reward",
    "searches": "searches a question",
    "malformed": "share malformed",
    "no_variance": "share of equal rewards",
    "entropy": "entropy (nats a token)",
    "kl": "KL to the start (nats a token)",
    "clip_fraction": "share clipped",
    "written_tokens": "tokens a rollout in the loss",
}


def policy_curves(cells: Sequence[Cell]):
    """A Matplotlib figure: metrics of rollouts over rounds, the mean over seeds in a band from least to
    most, a line for each variant and regime; None where no policy was trained."""
    runs: dict[tuple[str, str], list[list[dict]]] = {}
    for cell in cells:
        for task, rounds in cell.curves.items():
            if "reward" in rounds[0]["metrics"]:
                label = cell.labels.get(task, task)
                runs.setdefault((cell.regime, label), []).append(rounds)
    there = [m for m in METRICS if any(m in r[0][0]["metrics"] for r in runs.values())]
    if not runs:
        return None
    fig, axes = panels(len(there), most=4, width=2.3, height=2.0)
    styles = [*REGIME_STYLES.values(), *OTHER_STYLES]
    for (regime, label), (color, style) in zip(runs, styles, strict=False):
        found = runs[regime, label]
        x = [r["round"] for r in max(found, key=len)]
        for ax, metric in zip(axes.flat, there, strict=False):
            y = np.full((len(found), len(x)), np.nan)
            for line, rounds in zip(y, found, strict=True):
                line[: len(rounds)] = [r["metrics"].get(metric, np.nan) for r in rounds]
            name = f"{label}, {regime_name(regime)}"
            ax.plot(x, np.nanmean(y, 0), linestyle=style, color=color, lw=1.4, label=name)
            if len(found) > 1:
                least, most = np.nanmin(y, 0), np.nanmax(y, 0)
                ax.fill_between(x, least, most, color=color, alpha=0.15, lw=0)
    for ax, metric in zip(axes.flat, there, strict=False):
        ax.set_title(METRICS[metric], fontsize=9)
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("round")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0.01))
    fig.tight_layout()
    return fig
