"""A figure of who holds what: the classes of each client as a stacked bar, its size beside it."""

import pathlib

import numpy as np

from experiments.reporting.figures import pyplot
from fedrag_jax.data.partition import Column, Partition

# Paul Tol's muted scheme and black, told apart by colour-blind readers too.
CLASS_COLORS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99",
                "#999933", "#AA4499", "#000000")  # fmt: skip
REST_COLORS = ("#DDDDDD", "#C4C4C4")  # in turns, so that one sees how many classes the rest is
MAX_CLIENTS = 100


def label_distribution(data: Partition, path: pathlib.Path, column: Column = "topic") -> None:
    """Class shares of each client and of all, and how many examples a client has.

    The ten largest classes have a colour, others are grey. Of more than 100 clients, 100 are shown,
    evenly spread over the clients sorted by size.
    """
    plt = pyplot()
    classes, counts = data.counts(column)
    by_size = np.argsort(-counts.sum(0), kind="stable")
    # In their own order, so that splits of the same classes, few or many, have the same colours.
    order = [*np.sort(by_size[: len(CLASS_COLORS)]), *by_size[len(CLASS_COLORS) :]]
    classes, counts = [str(classes[c]) or "none" for c in order], counts[:, order]
    shown, name = _shown(counts.sum(1))
    height = _bar_height(len(shown))
    fig, (mix, size) = plt.subplots(
        1, 2, figsize=(6.3, 1.2 + height * (len(shown) + 2.5)), sharey=True, width_ratios=(4, 1)
    )
    overall = -max(1.7, 0.17 / height)  # its name stays clear of the first client's
    for y, held in [(overall, counts.sum(0)), *enumerate(counts[shown])]:
        _bar(mix, y, held / held.sum())
    size.barh(np.arange(len(shown)), counts[shown].sum(1), height=0.86, color="#8A8A8A")
    size.text(0, overall, f" {counts.sum():,}", va="center", fontsize=8)
    places = np.arange(0, len(shown), 1 if len(shown) <= 20 else 5 if len(shown) <= 60 else 10)
    numbers = [] if len(shown) < len(counts) else places
    mix.set_yticks([overall, *numbers], ["all", *map(str, numbers)])
    mix.set_ylim(len(shown) - 0.4, overall - 0.6)
    mix.set_xlim(0, 100)
    mix.set_ylabel(name)
    mix.set_xlabel("share of a client's examples (%)")
    size.set_xlabel("examples")
    size.tick_params(left=False)
    size.locator_params(axis="x", nbins=3, integer=True)
    for ax in (mix, size):
        ax.grid(visible=ax is size, axis="x")
        ax.grid(visible=False, axis="y")
    handles, labels = _legend(plt, classes)
    fig.tight_layout(w_pad=1.5)
    fig.legend(handles, labels, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    fig.savefig(path)
    plt.close(fig)


def _shown(sizes: np.ndarray) -> tuple[np.ndarray, str]:
    """Numbers of the clients that are drawn, from the top, and what the axis says."""
    if len(sizes) <= MAX_CLIENTS:
        return np.arange(len(sizes)), "client"
    places = np.linspace(0, len(sizes) - 1, MAX_CLIENTS).round().astype(int)
    by_size = np.argsort(-sizes, kind="stable")
    return by_size[places], f"{MAX_CLIENTS} of {len(sizes):,} clients, by size"


def _bar_height(clients: int) -> float:
    """Inches of a client: all fit on a page, and few do not look lost."""
    return float(np.clip(6 / clients, 0.065, 0.22))


def _bar(ax, y: float, shares: np.ndarray) -> None:
    (some,) = np.nonzero(shares)
    starts = np.cumsum(shares) - shares
    spans = np.stack([100 * starts[some], 100 * shares[some]], 1)
    colors = [
        CLASS_COLORS[c] if c < len(CLASS_COLORS) else REST_COLORS[i % 2] for i, c in enumerate(some)
    ]
    ax.broken_barh(spans, (y - 0.43, 0.86), facecolors=colors)


def _legend(plt, classes: list[str]):
    """Patches and names of the coloured classes, and one for the rest."""
    names, rest = classes[: len(CLASS_COLORS)], classes[len(CLASS_COLORS) :]
    colors = list(CLASS_COLORS[: len(names)])
    if rest:
        names = [*names, rest[0] if len(rest) == 1 else f"{len(rest)} others"]
        colors.append(REST_COLORS[0])
    return [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors], names
