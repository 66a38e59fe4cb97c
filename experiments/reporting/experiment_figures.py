"""Figures of single experiments: rules, objectives, refresh policies."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.comparison import METRICS
from experiments.reporting.figures import (
    COLORS,
    MARKERS,
    OTHER_STYLES,
    REGIME_STYLES,
    legend,
    panels,
    pyplot,
    regime_name,
)


def differences(rows: Sequence[dict[str, Any]]):
    """Draws the gain of each objective with its interval: a panel for each metric, a colour for each
    regime. Returns a Matplotlib figure, or None without rows.

    Args:
      rows: `objective`, `regime`, `metric`, `difference`, `low`, `high`.
    """
    rows = [row for row in rows if row.get("difference") is not None]
    if not rows:
        return None
    metrics, regimes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("metric", "regime"))
    names = {
        m: list(dict.fromkeys(r["objective"] for r in rows if r["metric"] == m)) for m in metrics
    }
    plt = pyplot()
    height = 0.6 + 0.24 * max(map(len, names.values()))
    fig, axes = plt.subplots(1, len(metrics), figsize=(2.9 * len(metrics), height), squeeze=False)
    styles = [*REGIME_STYLES.values(), *OTHER_STYLES]
    for ax, metric in zip(axes[0], metrics, strict=True):
        for i, regime in enumerate(regimes):
            some = [r for r in rows if (r["metric"], r["regime"]) == (metric, regime)]
            y = np.array([names[metric].index(r["objective"]) for r in some], float)
            x = np.array([r["difference"] for r in some])
            error = x - [r["low"] for r in some], [r["high"] for r in some] - x
            color, _ = REGIME_STYLES.get(regime, styles[i % len(styles)])
            ax.errorbar(
                x, y + 0.22 * (i - (len(regimes) - 1) / 2), xerr=error, fmt="o", ms=4, capsize=2,
                lw=1, color=color, label=regime_name(regime),
            )  # fmt: skip
        ax.axvline(0, color="#000000", lw=1, ls=":")
        ax.set_yticks(range(len(names[metric])), names[metric])
        ax.set_ylim(len(names[metric]) - 0.5, -0.5)
        ax.set_xlabel(f"{METRICS.get(metric, metric)}: change (points)")
    if len(regimes) > 1:
        handles, labels = legend(axes)
        fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig


# For lines of which none is known by its name.
LOOKS = tuple(
    zip(
        ("#000000", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#777777"),
        "ovs^DPX*",
        strict=True,
    )
)


def refresh_policies(rows: Sequence[dict[str, Any]]):
    """Draws the loss against an always fresh index over re-embedded passages, and staleness over
    retrievals: a row of panels for each regime. Returns a Matplotlib figure, or None without rows.

    Args:
      rows: `policy`, `regime`, `embedded`, `stale_by_refresh` and, but of what is always fresh,
        `difference`, `low` and `high`.
    """
    if not rows:
        return None
    regimes, policies = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("regime", "policy")
    )
    plt = pyplot()
    fig, axes = plt.subplots(
        len(regimes), 2, figsize=(7.0, 2.2 * len(regimes) + 0.3), squeeze=False, sharex="col"
    )
    for (quality, age), regime in zip(axes, regimes, strict=True):
        for row in (r for r in rows if r["regime"] == regime):
            color, marker = LOOKS[policies.index(row["policy"]) % len(LOOKS)]
            look = {"color": color, "label": row["policy"].replace("_", " ")}
            y, low, high = (row.get(name) or 0.0 for name in ("difference", "low", "high"))
            quality.errorbar(
                row["embedded"] / 1000, y, yerr=[[y - low], [high - y]], fmt=marker, ms=5,
                capsize=2, lw=1, **look,
            )  # fmt: skip
            stale = row["stale_by_refresh"]
            age.plot(range(1, len(stale) + 1), stale, marker=marker, ms=4, lw=1, **look)
        quality.axhline(0, color="#000000", lw=0.5)
        quality.set_ylabel("Recall@5 against\nalways fresh (points)")
        age.set_ylabel("stale passages (%)")
        for ax in (quality, age):
            ax.set_title(regime_name(regime), fontsize=10)
        age.set_ylim(bottom=-1)
    axes[-1][0].set_xlabel("passages re-embedded (thousands)")
    axes[-1][1].set_xlabel("retrieval")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig


RULES = {"fedit": "FedIT", "ffa": "FFA", "rolora": "RoLoRA", "flora": "FLoRA", "fedex": "FedEx",
         "flexlora": "FlexLoRA", "fedsa": "FedSA"}  # fmt: skip


def over_rules(rows: Sequence[dict[str, Any]], untuned: float):
    """Answer NLL of aggregation rules by rank, a panel per alpha: a Matplotlib figure, or None.

    Args:
      rows: `rule`, `rank`, `alpha`, `nll`, `nll_low`, `nll_high`.
      untuned: the NLL before training.
    """
    if not rows:
        return None
    alphas, ranks, rules = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("alpha", "rank", "rule")
    )
    fig, axes = panels(len(alphas), most=3, width=3.4, height=2.5, sharey=True)
    for ax, alpha in zip(axes.flat, alphas, strict=False):
        for i, rank in enumerate(ranks):
            some = [r for r in rows if (r["alpha"], r["rank"]) == (alpha, rank)]
            x = np.array([rules.index(r["rule"]) for r in some]) + 0.2 * (i - (len(ranks) - 1) / 2)
            nll = np.array([r["nll"] for r in some])
            error = nll - [r["nll_low"] for r in some], [r["nll_high"] for r in some] - nll
            color, marker = COLORS[1:][i % 6], MARKERS[i % 7]
            ax.errorbar(
                x, nll, yerr=error, fmt=marker, ms=5, capsize=2, lw=1, color=color,
                label=f"rank {rank}",
            )  # fmt: skip
        ax.axhline(untuned, color="#000000", lw=1, ls=":", label="untuned")
        ax.set_xticks(range(len(rules)), [RULES[rule] for rule in rules], rotation=35)
        ax.set_title(f"α = {alpha:g}".replace("inf", "∞"), fontsize=10)
    axes[0][0].set_ylabel("NLL of test answers (nats)")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig


def over_bytes(rows: Sequence[dict[str, Any]], metric: str):
    """A score over megabytes sent, a panel for each strategy, with the Pareto front: a Matplotlib
    figure, or None.

    Args:
      rows: `strategy`, `messages`, `bytes`, `pareto`, and the metric with its `_low` and `_high`.
    """
    from matplotlib import ticker  # here, as `pyplot` is

    rows = [row for row in rows if row.get(metric) is not None]
    if not rows:
        return None
    strategies, kinds = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("strategy", "messages")
    )
    fig, axes = panels(len(strategies), most=3, width=3.4, height=2.5)
    for ax, strategy in zip(axes.flat, strategies, strict=False):
        some = [r for r in rows if r["strategy"] == strategy]
        for row in some:
            color, marker = LOOKS[kinds.index(row["messages"]) % len(LOOKS)]
            y, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
            ax.errorbar(
                row["bytes"] / 1e6, y, yerr=[[y - low], [high - y]], fmt=marker, ms=5, capsize=2,
                lw=1, color=color, label=row["messages"].replace("_", " "),
            )  # fmt: skip
        front = sorted((r["bytes"] / 1e6, r[metric]) for r in some if r.get("pareto"))
        ax.plot(*zip(*front, strict=True), color="#000000", lw=0.8, ls=":", zorder=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_title(strategy)
        ax.set_xlabel("sent up and down (MB)")
        ax.set_ylabel(f"{METRICS.get(metric, metric)} (%)")
    handles, labels = legend(axes)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.tight_layout()
    return fig
