"""Figures for a paper: quality against cost, and learning curves."""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reporting.cells import Cell
from experiments.reporting.comparison import by_cell

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#000000", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
MARKERS = "ovs^DPX"
# Of strategies that are in no table, in the order they come.
OWN = (("#8C510A", "h"), ("#5E3C99", "p"), ("#01665E", "<"), ("#B2182B", ">"))
REGIME_STYLES = {
    "centralised": ("#0072B2", "-"),
    "federated": ("#D55E00", "--"),
    "local": ("#777777", ":"),
}
OTHER_STYLES = (
    ("#E69F00", "-."), ("#009E73", (0, (1, 1))), ("#CC79A7", (0, (5, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1))), ("#000000", (0, (1, 2))), ("#F0E442", "-"),
)  # fmt: skip


class Look(NamedTuple):
    """The style of a strategy in figures."""

    label: str
    color: str
    marker: str


def looks_of(strategies: Iterable[str]) -> dict[str, Look]:
    """The look of each strategy of a figure; those of a user's own go by their names."""
    from fedrag_jax.strategies.strategies import STRATEGIES  # imports JAX

    own, looks = itertools.cycle(OWN), {}
    for name in dict.fromkeys(strategies):
        row = STRATEGIES.get(name)
        looks[name] = Look(row.label, row.color, row.marker) if row else Look(name, *next(own))
    return looks


def regime_name(regime: str) -> str:
    """`federated_inf_converged:fedprox` as readers know it: federated, α = ∞, converged, fedprox."""
    where, _, algorithm = regime.partition(":")
    kind, _, alpha = where.removesuffix("_converged").partition("_")
    said = [kind, f"α = {alpha.replace('inf', '∞')}" if alpha else ""]
    said += ["converged" if where.endswith("_converged") else "", algorithm]
    return ", ".join(part for part in said if part)


def pyplot():
    """Matplotlib in the style of all figures; it needs no display, and in a notebook uses it."""
    import matplotlib  # slow, and only for those who draw

    if "MPLBACKEND" not in os.environ:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e5e5",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
        }
    )
    return plt


ENDS = ("", "_low", "_high")  # of a mean and its interval
# What quality costs: its name and its unit.
COSTS = {"seconds": ("training time (s)", 1), "flops": ("training operations (10¹²)", 1e12)}


def quality_against_cost(rows: Sequence[dict[str, Any]], cost: str = "seconds"):
    """EM with its interval over one of `COSTS`, a panel per regime: a Matplotlib figure, or None.

    Rows without that cost are left out.
    """
    if not rows:
        return None
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    looks = looks_of(row["strategy"] for row in rows)
    title, unit = COSTS[cost]
    fig, axes = panels(len(regimes), most=3, width=2.6, height=2.7, sharex=True, sharey=True)
    for ax, regime in zip(axes.flat, regimes, strict=False):
        for row in (r for r in rows if r["regime"] == regime):
            look = looks[row["strategy"]]
            if row["strategy"] == "none":
                ax.axhline(row["em"], color=look.color, lw=1, ls=":", label="untuned")
                ax.axhspan(row["em_low"], row["em_high"], color=look.color, alpha=0.12, lw=0)
                continue
            if row[cost] is None:  # not declared by an objective
                continue
            error = [[row["em"] - row["em_low"]], [row["em_high"] - row["em"]]]
            ax.errorbar(
                row[cost] / unit, row["em"], yerr=error, fmt=look.marker, ms=6, capsize=2, lw=1,
                color=look.color, label=look.label,
            )  # fmt: skip
        ax.set_title(regime_name(regime), fontsize=10)
        ax.set_xlabel(title)
        ax.tick_params(labelbottom=True)
    if any(row[cost] for row in rows):
        _log_scale(axes[0][0])  # a retriever trains in a second, a generator in minutes
    for line in axes:
        line[0].set_ylabel("test exact match (%)")
    low, high = axes[0][0].get_ylim()
    if high - low < 1:  # all the same, such as 0: still a scale of percent
        axes[0][0].set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig


def learning_curves(cells: Sequence[Cell]):
    """A Matplotlib figure: training loss of each objective over examples seen, the mean over seeds in
    a band from least to most; None where nothing was trained. A training that has ended is in neither.
    """
    curves: dict[str, dict[str, list[list[dict]]]] = {}
    titles: dict[str, str] = {}
    for group in by_cell(cells).values():
        for cell in group:
            titles |= cell.labels
            for task, rounds in cell.curves.items():
                found = curves.setdefault(task, {}).setdefault(cell.regime, [])
                if rounds not in found:  # independent shows the curves of its parts
                    found.append(rounds)
    if not curves:
        return None
    fig, axes = panels(len(curves), most=3, width=2.7, height=2.3)
    regimes = dict.fromkeys(regime for runs in curves.values() for regime in runs)
    others = itertools.cycle(OTHER_STYLES)
    styles = {s: REGIME_STYLES.get(s) or next(others) for s in regimes}
    for ax, (task, by_regime) in zip(axes.flat, curves.items(), strict=False):
        for regime, runs in by_regime.items():
            color, style = styles[regime]
            x = [r["examples"] for r in max(runs, key=len)]
            y = np.full((len(runs), len(x)), np.nan)
            for losses, rounds in zip(y, runs, strict=True):
                losses[: len(rounds)] = [r["loss"] for r in rounds]
            ax.plot(
                x, np.nanmean(y, 0), linestyle=style, marker="o", ms=2.5, lw=1.4, color=color,
                label=regime_name(regime),
            )  # fmt: skip
            if len(runs) > 1:
                least, most = np.nanmin(y, 0), np.nanmax(y, 0)
                ax.fill_between(x, least, most, color=color, alpha=0.15, lw=0)
        _log_scale(ax)  # lone clients see many more than all did together
        ax.set_title(titles.get(task, task), fontsize=9)
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("training examples seen")
    for row in axes:
        row[0].set_ylabel("training loss")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.01))
    fig.tight_layout()
    return fig


def _log_scale(ax) -> None:
    """The x axis in decades, with ticks as plain numbers."""
    from matplotlib import ticker  # slow, as Matplotlib is above

    ax.set_xscale("log")
    least, most = ax.get_xlim()
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if most > 150 * least else (1, 3)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.6g}"))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def panels(count: int, most: int, width: float, height: float, **shared):
    """Returns a figure and axes [lines, columns], at most `most` columns; width, height: of a panel."""
    columns = min(most, count)
    lines = -(-count // columns)
    size = 0.5 + width * columns, 0.2 + height * lines
    fig, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, **shared)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, axes


def legend(axes):
    """Handles and labels of all panels, each once."""
    pairs = (pair for ax in axes.flat for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    found = {label: handle for handle, label in pairs}
    return list(found.values()), list(found)


def over_factors(rows: Sequence[dict[str, Any]], names: dict[str, str], usual: dict[str, Any]):
    """EM over the values of each factor, a panel per factor: a Matplotlib figure, or None.

    Args:
      rows: `factor`, `value`, `strategy`, `em`, `em_low`, `em_high`.
      names: of the axes.
      usual: the value of each factor whose mark is open.
    """
    if not rows:
        return None
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    looks = looks_of(row["strategy"] for row in rows)
    fig, axes = panels(len(factors), most=2, width=3.0, height=2.5, sharey=True)
    for ax, factor in zip(axes.flat, factors, strict=False):
        values = sorted({row["value"] for row in rows if row["factor"] == factor})
        names_here = list(dict.fromkeys(row["strategy"] for row in rows))
        for place, name in enumerate(names_here):
            some = [r for r in rows if (r["factor"], r["strategy"]) == (factor, name)]
            look = looks[name]
            x = np.array([values.index(row["value"]) for row in some])
            em, low, high = (np.array([row[f"em{end}"] for row in some]) for end in ENDS)
            if name == "none":
                ax.plot(x, em, color=look.color, lw=1, ls=":", label=look.label)
                ax.fill_between(x, low, high, color=look.color, alpha=0.12, lw=0)
                continue
            error = em - low, high - em
            x = x + 0.08 * (place - (len(names_here) - 1) / 2)  # intervals beside each other
            ax.errorbar(
                x, em, yerr=error, fmt=look.marker, ls="-", ms=5, capsize=2, lw=1,
                color=look.color, label=look.label,
            )  # fmt: skip
            here = [row["value"] == usual[factor] for row in some]
            ax.plot(x[here], em[here], look.marker, ms=6.5, mfc="white", color=look.color, zorder=5)
        ax.set_xticks(range(len(values)), [f"{value:g}".replace("inf", "∞") for value in values])
        ax.set_xlabel(names[factor])
    for line in axes:
        line[0].set_ylabel("test exact match (%)")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig
