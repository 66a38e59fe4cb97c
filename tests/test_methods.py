"""The tables of objectives and of refresh policies, small."""

import csv

import numpy as np
import pytest
from small import small_methods, small_refresh

from experiments import index_refresh, methods, report
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.errors import ConfigError

pytestmark = pytest.mark.slow  # whole experiments, if small ones


@pytest.fixture(scope="module")
def objectives(tmp_path_factory):
    return run(methods.EXPERIMENT, small_methods(), str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return run(index_refresh.EXPERIMENT, small_refresh(), str(tmp_path_factory.mktemp("runs")))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_objective_and_metric(objectives):
    rows = read(objectives / "methods.csv")
    assert [(r["objective"], r["metric"]) for r in rows] == [
        ("no_op", "recall_at_5"), ("no_op", "mrr"),
        ("in_batch", "recall_at_5"), ("in_batch", "mrr"), ("in_batch", "recall_at_5_cut"),
        ("concatenated", "em"), ("concatenated", "f1"),
    ]  # fmt: skip
    for row in rows:
        difference, low, high = (float(row[name]) for name in ("difference", "low", "high"))
        assert float(row["after"]) - float(row["before"]) == pytest.approx(difference)
        assert low <= difference <= high
        assert float(row["bytes_up"]) > 0


def test_a_rate_of_zero_changes_nothing_and_others_do(objectives):
    start, no_op, tuned = (
        cells.load(objectives, name, "federated", 0, 0) for name in ("none", "no_op", "in_batch")
    )
    np.testing.assert_array_equal(no_op.scores["mrr"], start.scores["mrr"])
    assert (tuned.scores["mrr"] != start.scores["mrr"]).any()


@pytest.mark.parametrize(
    "low, high, p, words",
    [
        (0.0, 0.0, 1.0, "no difference shown"),
        (-0.1, 2.0, 0.01, "no difference shown"),
        (0.1, 2.0, 0.01, "better"),
        (0.1, 2.0, 0.2, "better, not after Holm"),
        (-2.0, -0.1, 0.01, "worse"),
    ],
)
def test_what_may_be_claimed(low, high, p, words):
    assert methods.verdict({"low": low, "high": high, "p_holm": p}) == words


def test_a_row_for_every_policy(policies):
    rows = {row["policy"]: row for row in read(policies / "index_refresh.csv")}
    assert [*rows] == ["every_1", "in_use_40", "never", "query_side"]
    embedded = {name: float(row["embedded"]) for name, row in rows.items()}
    # The first of two retrievals finds the index as it was made.
    assert embedded["never"] == embedded["query_side"] == 0
    assert embedded["every_1"] == 2000 > embedded["in_use_40"] > 40
    assert float(rows["query_side"]["stale"]) == 0 < float(rows["never"]["stale"])
    assert float(rows["never"]["stale"]) > float(rows["every_1"]["stale"])
    # Where nothing is to be re-embedded, the index that training left is a new one.
    assert rows["query_side"]["recall_at_5_left"] == rows["query_side"]["recall_at_5"] != "0.0"
    assert rows["every_1"]["difference"] == "" != rows["never"]["difference"]


def test_finished_cells_are_read_back_and_reports_made_again(objectives, policies):
    for folder, experiment, config in (
        (objectives, methods, small_methods()),
        (policies, index_refresh, small_refresh()),
    ):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("cell.json")}
        run(experiment.EXPERIMENT, config, str(folder.parent))
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("cell.json")}
        written = report.rebuild(folder)
        assert "report.html" in written and any(name.endswith(".png") for name in written)


@pytest.mark.parametrize(
    "experiment, config, change, words",
    [
        (methods, small_methods, {"objectives": ("rank",)}, r"\['rank'\] unknown"),
        (methods, small_methods, {"regimes": ("local",)}, "centralised and federated"),
        (index_refresh, small_refresh, {"objective": "rank"}, "'rank' unknown"),
        (index_refresh, small_refresh, {"policies.never.every": -1}, "'never': a refresh policy"),
        (index_refresh, small_refresh, {"regimes": ("local",)}, r"\['local'\] unknown"),
    ],
)
def test_what_cannot_be_is_refused(experiment, config, change, words, tmp_path):
    config = config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=words):
        run(experiment.EXPERIMENT, config, str(tmp_path))
