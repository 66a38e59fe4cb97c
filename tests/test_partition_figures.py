"""The picture of who holds what shows all clients it says, in proportions that are right."""

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from experiments.reporting import partition_figures
from experiments.reporting.partition_figures import CLASS_COLORS, REST_COLORS, label_distribution
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet, iid

matplotlib.use("Agg")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, checks that a picture is there, and returns the two panels."""
    plt = partition_figures.pyplot()
    monkeypatch.setattr(plt, "close", lambda fig: None)

    def draw(data, labels):
        label_distribution(data, tmp_path / "figure.png", labels)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        return plt.gcf()

    yield draw
    monkeypatch.undo()
    plt.close("all")


def bars(ax) -> list[list[tuple[str, float]]]:
    """Colours and widths of the pieces of each bar, the one of all examples first."""
    found = []
    for bar in (c for c in ax.collections if isinstance(c, PolyCollection)):
        colors = [matplotlib.colors.to_hex(c).upper() for c in bar.get_facecolors()]
        widths = [np.ptp(path.vertices[:, 0]) for path in bar.get_paths()]
        found.append(list(zip(colors, widths, strict=True)))
    return found


def test_bars_are_the_shares_of_clients_and_of_all(drawn):
    labels = np.array(["a", "a", "a", "b", "c", "c"])
    fig = drawn(Partition(labels, (np.array([0, 1, 2, 3]), np.array([4, 5]))), labels)
    mix, sizes = fig.axes
    a, b, c = CLASS_COLORS[:3]
    expected = [[(a, 50), (b, 100 / 6), (c, 100 / 3)], [(a, 75), (b, 25)], [(c, 100)]]
    for found, wanted in zip(bars(mix), expected, strict=True):
        assert [color for color, _ in found] == [color for color, _ in wanted]
        assert [w for _, w in found] == pytest.approx([w for _, w in wanted])
    assert [bar.get_width() for bar in sizes.patches] == [4, 2]
    assert [text.get_text() for text in fig.legends[0].texts] == ["a", "b", "c"]
    assert [text.get_text() for text in mix.get_yticklabels()] == ["all", "0", "1"]


def test_small_classes_are_grey_in_turns(drawn):
    labels = np.repeat(np.arange(13), [9, 9, 9, 1, 9, 9, 9, 1, 9, 9, 9, 1, 9])
    fig = drawn(partition(labels, iid(1)), labels)
    last = [color for color, _ in bars(fig.axes[0])[0]][-3:]
    assert last in ([*REST_COLORS, REST_COLORS[0]], [*REST_COLORS[::-1], REST_COLORS[1]])
    assert fig.legends[0].texts[-1].get_text() == "3 others"


def test_of_many_clients_a_hundred_are_shown_by_size(drawn):
    labels = np.arange(3000) % 4
    data = partition(labels, dirichlet(1, 250, labels))
    fig = drawn(data, labels)
    mix, sizes = fig.axes
    assert len(bars(mix)) == len(sizes.patches) + 1 == 101
    shown = [bar.get_width() for bar in sizes.patches]
    assert shown == sorted(shown, reverse=True)
    assert (shown[0], shown[-1]) == (data.sizes().max(), data.sizes().min())
    assert mix.get_ylabel() == "100 of 250 clients, by size"
