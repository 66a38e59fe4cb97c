"""Numbers of a table, by hand."""

import numpy as np
import pytest

from experiments.launch import kept_config
from experiments.reporting import comparison, comparison_tables, differences, figures, tables
from experiments.reporting.cells import Cell, load, save
from fedrag_jax.evaluation.significance import paired_t_test
from fedrag_jax.strategies.regimes import parse
from fedrag_jax.tracking.ledger import Cost

REGIMES = {
    name: parse(name, 0.1)
    for name in (
        "centralised", "federated", "federated_1", "federated_converged", "local", "local_1",
        "local_converged",
    )
}  # fmt: skip


def cell(strategy, regime, em, seed=0, split=0, clients=(), recall=None, seconds=1.0):
    em = np.asarray(em, float)
    recall = em if recall is None else np.asarray(recall, float)
    scores = {"em": em, "f1": em, "recall_at_5": recall, "mrr": recall}
    clusters = np.arange(len(em))
    return Cell(
        strategy, regime, seed, split, scores, {}, list(clients), Cost(seconds), {}, clusters
    )


def shown(table) -> list[list[str]]:
    """The body of a table as people see it."""
    lines = table.markdown().splitlines()[2:]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


def beside_others(cell):
    """A cell whose test questions stand before others, which they do not score."""
    scores = {name: np.append(x, np.nan) for name, x in cell.scores.items()}
    return cell._replace(scores=scores, clusters=np.append(cell.clusters, 99))


def test_spreads_of_model_and_split_seeds_are_told_apart():
    # EM in points: 0 25 75 for the models of split 0, 50 100 for those of split 1.
    means = {(0, 0): 0, (1, 0): 1, (2, 0): 3, (0, 1): 2, (1, 1): 4}
    cells = [
        cell("retriever", "local", [1] * right + [0] * (4 - right), *seeds)
        for seeds, right in means.items()
    ]
    (row,) = comparison.strategy_rows(cells, REGIMES)
    within_splits = np.array([0, 25, 75]), np.array([50, 100])
    squares = sum(((x - x.mean()) ** 2).sum() for x in within_splits)
    assert row["em_model_sd"] == pytest.approx(np.sqrt(squares / (2 + 1)))
    # By model: 0 50, 25 100, and one that has a single split.
    assert row["em_split_sd"] == pytest.approx(np.sqrt((50**2 + 75**2) / 2 / 2))
    assert row["em"] == 50 and row["alpha"] == 0.1
    (again,) = comparison.strategy_rows([beside_others(c) for c in cells], REGIMES)
    assert (again["em_model_sd"], again["em_split_sd"]) == (row["em_model_sd"], row["em_split_sd"])
    (row,) = comparison.strategy_rows(cells[:1], REGIMES)
    assert row["em_model_sd"] is None
    (row,) = comparison.strategy_rows([cell("none", "centralised", [0, 1])], REGIMES)
    assert row["alpha"] == ""


def test_clients_from_the_worst_to_the_ninth_decile():
    cells = [cell("generator", "local", [1, 0], clients=range(0, 101, 10))]
    cells.append(cell("generator", "local", [1, 0], seed=1, clients=[20, 40]))
    (row,) = comparison.strategy_rows(cells, REGIMES)
    assert row["client_em_mean"] == (50 + 30) / 2
    assert row["client_em_worst"] == (0 + 20) / 2
    assert row["client_em_decile_1"] == (10 + 22) / 2
    assert row["client_em_decile_9"] == (90 + 38) / 2
    assert shown(comparison_tables.clients_table([row])) == [
        ["generator", "local", "40.0", "10.0", "16.0", "64.0", "–", "–"]
    ]
    # At seed 1, which both have: 30 against 40, and the worst 20 against 25.
    together = cell("generator", "centralised", [1, 0], seed=1, clients=[25, 55])
    lines = shown(
        comparison_tables.clients_table(comparison.strategy_rows([*cells, together], REGIMES))
    )
    assert lines[0][-2:] == ["-10.0", "-5.0"]
    (row,) = comparison.strategy_rows([cell("none", "local", [1, 0])], REGIMES)
    assert "client_em_mean" not in row


def test_comparisons_by_hand():
    rng = np.random.default_rng(0)
    cells = []
    for seed in range(5):
        noise = rng.random(40) < 0.1
        for regime, gain in (("centralised", 12), ("federated_1", 10), ("local_1", 0)):
            cells.append(cell("none", regime, [0] * 40, seed))
            right = np.arange(40) < gain
            cells.append(cell("retriever", regime, right ^ noise, seed))
    rows = differences.comparison_rows(cells, "em", REGIMES, margin=10.0)
    pairs = [(r["strategy"], r["regime"], r["against"]) for r in rows]
    assert pairs == [
        ("retriever", "centralised", "none, centralised"),
        ("retriever", "federated_1", "none, federated_1"),
        ("retriever", "local_1", "none, local_1"),
        ("retriever", "federated_1", "retriever, centralised"),
        ("retriever", "federated_1", "retriever, local_1"),
    ]
    one = rows[4]
    a, b = (
        np.stack([c.scores["em"] for c in cells if c.regime == s and c.strategy == "retriever"])
        for s in ("federated_1", "local_1")
    )
    d = (a - b).mean(0)
    assert one["difference"] == pytest.approx(100 * d.mean())
    assert one["effect"] == pytest.approx(d.mean() / d.std(ddof=1))
    assert (one["better"], one["worse"]) == (100 * np.mean(d > 0), 100 * np.mean(d < 0))
    assert one["low"] < one["difference"] < one["high"]
    assert all(row["p"] <= row["p_holm"] and row["p_t"] <= row["p_t_holm"] for row in rows)
    assert rows[3]["difference"] < 0
    # Two questions of forty fewer: five points or less, equal within ten and not within two.
    assert rows[3]["p_e"] <= rows[3]["p_e_holm"] and rows[3]["p_e"] < 0.1
    strict = differences.comparison_rows(cells, "em", REGIMES, margin=2.0)
    assert strict[3]["p_e"] > 0.5
    # Local training on another split is no partner.
    other = REGIMES | {"local_1": parse("local", 0.1)}
    apart = differences.comparison_rows(cells, "em", other, margin=10.0)
    assert [row["against"] for row in apart][3:] == ["retriever, centralised"]


def test_runs_are_paired_by_their_seeds():
    rng = np.random.default_rng(0)
    some, others = ([rng.random(30) for _ in range(6)] for _ in range(2))
    here = [cell("retriever", "local", em, seed, seed) for seed, em in enumerate(some)]
    there = [cell("none", "local", em, seed, seed) for seed, em in enumerate(others)]
    (row,) = differences.comparison_rows([*here, *reversed(there)], "em", REGIMES, 2.0)
    (less,) = differences.comparison_rows([*here[:5], *there[1:]], "em", REGIMES, 2.0)
    assert row["p_t"] == pytest.approx(paired_t_test(some, others))
    assert less["difference"] == pytest.approx(100 * np.mean(np.array(some[1:5]) - others[1:5]))
    assert less["p_t"] is None  # four pairs


@pytest.mark.parametrize(
    "seeds, splits, tested",
    [
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], True),
        ([0, 1, 2, 3, 4], [7] * 5, True),
        ([7] * 5, [0, 1, 2, 3, 4], True),
        ([0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], False),  # six runs of two splits
    ],
)
def test_runs_that_share_seeds_have_no_t_test(seeds, splits, tested):
    rng = np.random.default_rng(0)
    cells = [
        cell(strategy, "federated", rng.random(20), *pair)
        for strategy in ("none", "generator")
        for pair in zip(seeds, splits, strict=True)
    ]
    (row,) = differences.comparison_rows(cells, "em", REGIMES, 2.0)
    assert (row["p_t"] is not None) == tested


def test_against_independent_tuning():
    rng = np.random.default_rng(1)
    cells = []
    for seed in range(3):
        for name, seconds in (("independent", 2.0), ("joint_token", 5.0 + seed), ("none", 0.0)):
            some = cell(name, "federated", rng.random(30) < 0.5, seed, seconds=seconds)
            cells.append(some._replace(cost=some.cost._replace(flops=3.0 + len(name))))
    cells.append(cell("joint_token", "local", [0, 1]))  # with nothing to be compared to
    (row,) = differences.independent_rows(cells, 2.0)
    assert (row["strategy"], row["regime"]) == ("joint_token", "federated")
    assert row["seconds_ratio"] == pytest.approx((2.5 + 3 + 3.5) / 3)
    assert (row["seconds_ratio_low"], row["seconds_ratio_high"]) == (2.5, 3.5)
    assert row["flops_ratio"] == 1.0
    (joint, alone) = (
        np.mean([c.scores["em"] for c in cells if (c.strategy, c.regime) == (s, "federated")])
        for s in ("joint_token", "independent")
    )
    assert row["em_difference"] == pytest.approx(100 * (joint - alone))
    assert row["em_p"] == row["em_p_holm"] and row["recall_at_5_low"] < row["recall_at_5_high"]
    assert row["mrr_p_e"] == row["mrr_p_e_holm"]
    assert "3.00 [2.50, 3.50]" in comparison_tables.independent_table([row]).markdown()


def test_few_seeds_have_no_t_test_and_unlabelled_questions_no_ranking():
    blank = [np.nan] * 3
    cells = [cell(s, "local", [0, 1, i], recall=blank) for i, s in enumerate(("none", "generator"))]
    (row,) = differences.comparison_rows(cells, "em", REGIMES, 2.0)
    assert row["p_t"] is None and "p_t_holm" not in row
    assert differences.comparison_rows(cells, "recall_at_5", REGIMES, 2.0) == []
    assert shown(comparison_tables.comparisons_table([row]))[0][-2] == "–"


def test_what_needs_labels_says_so_where_there_are_none():
    cells = [cell(s, "centralised", [0, 1]) for s in ("none", "retriever", "two_phase")]
    table = shown(comparison_tables.without_labels_table(comparison.strategy_rows(cells, REGIMES)))
    assert table[1] == ["retriever", "centralised", "needs gold passages", "–", "–"]
    assert table[2][2].startswith("50.0 [")


def test_cells_of_other_splits_lie_apart(tmp_path):
    same, other = cell("none", "local", [0, 1], 3, 3), cell("none", "local", [1, 1], 3, 4, [50.0])
    save(tmp_path, same)
    save(tmp_path, other)
    assert load(tmp_path, "none", "local", 3, 3).scores["em"].tolist() == [0, 1]
    assert load(tmp_path, "none", "local", 3, 4).client_em == [50.0]
    assert load(tmp_path, "none", "local", 4, 4) is None
    assert (tmp_path / "cells/none-local-seed3-split4/cell.json").exists()


def test_a_table_in_three_languages():
    columns = [
        tables.words("who & why", "who"), tables.number("α = ∞", "x", 2, unit=10.0),
        tables.interval("EM", "em"), tables.p_value("p", "p"),
    ]  # fmt: skip
    rows = [
        {
            "who": "two_phase <b>",
            "x": 123.456,
            "em": 50.0,
            "em_low": 40.04,
            "em_high": 60.06,
            "p": 2e-4,
        },
        {"who": "ε ≈ 8", "x": None, "em": 1.0, "em_low": 0.0, "em_high": 2.0, "p": 1.0},
    ]
    table = tables.Table(columns, rows)
    assert shown(table) == [
        ["two_phase <b>", "12.35", "50.0 [40.0, 60.1]", "<0.001"],
        ["ε ≈ 8", "–", "1.0 [0.0, 2.0]", "1.000"],
    ]
    latex = table.latex()
    assert r"two\_phase" in latex and r"who \& why" in latex and r"$\alpha$ = $\infty$" in latex
    assert latex.startswith(r"\begin{tabular}{lrrr}") and latex.isascii()
    assert "two_phase &lt;b&gt;" in table.html() and "<b>" not in table.html()


def test_strategies_at_a_glance():
    cells = [cell("none", "local", [0, 1]), cell("none", "centralised", [1, 1])]
    cells.append(cell("generator", "local", [1, 1]))
    table = comparison_tables.glance_table(comparison.strategy_rows(cells, REGIMES))
    assert [c.title for c in table.columns] == ["strategy", "local", "centralised"]
    assert shown(table) == [
        ["none", "50.0 [0.0, 100.0]", "100.0 [100.0, 100.0]"],
        ["generator", "100.0 [100.0, 100.0]", "–"],
    ]


def test_rows_for_machines(tmp_path):
    tables.write_csv(tmp_path / "rows.csv", [{"a": 0.1 + 0.2, "b": "x"}, {"c": 1}])
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b,c", f"{0.1 + 0.2},x,", ",,1"]


def test_estimates_have_intervals_over_seeds_and_clusters():
    seeds = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    cells = [cell("none", "local", em, seed) for seed, em in enumerate(seeds)]
    clusters = np.array([0, 0, 1, 1])
    cells = [c._replace(clusters=clusters) for c in cells]
    found = comparison.estimate(cells, "em")
    assert found["em"] == 50 and found["em_sd"] == pytest.approx(50)
    assert (found["em_low"], found["em_high"]) == (0, 100)  # questions alone: 33 to 67
    blank = [c._replace(scores=c.scores | {"mrr": np.full(4, np.nan)}) for c in cells]
    assert comparison.estimate(blank, "mrr") == dict.fromkeys(
        ("mrr", "mrr_low", "mrr_high", "mrr_sd")
    )
    assert shown(tables.Table([tables.interval("EM", "em")], [found])) == [
        ["50.0 ± 50.0 [0.0, 100.0]"]
    ]


def test_epochs_are_those_of_the_models_that_were_kept():
    curves = {
        "rank": [{"epochs": 2.0, "kept_epochs": 1.5, "at_cap": 1, "trainings": 8}],
        "read": [{"epochs": 1.0, "kept_epochs": 0.5, "at_cap": 0, "trainings": 8}],
    }
    (row,) = comparison.strategy_rows(
        [cell("independent", "local_converged", [0, 1])._replace(curves=curves)], REGIMES
    )
    assert (row["epochs"], row["at_cap"]) == ("1.5 + 0.5", "1 of 16")
    matched = {"rank": [{"epochs": 0.48}]}
    (row,) = comparison.strategy_rows(
        [cell("retriever", "local", [0, 1])._replace(curves=matched)], REGIMES
    )
    assert row["epochs"] == "0.5" and "at_cap" not in row


def test_differences_are_marked_where_they_are_shown_either_way():
    rows = []
    for metric, p, same in (("em", 0.01, 1.0), ("f1", 0.9, 0.01), ("mrr", 0.9, 0.9)):
        found = {"difference": 1.0, "low": 0.5, "high": 1.5, "p_holm": p, "p_e_holm": same}
        about = {"strategy": "retriever", "regime": "federated", "metric": metric}
        rows.append(about | {"against": "retriever, centralised"} | found)
        rows.append(about | {"against": "none, federated"} | found)  # no other regime
    (line,) = shown(comparison_tables.every_metric_table(rows))
    assert line == [
        "retriever", "federated", "centralised", "+1.0 [+0.5, +1.5] *", "+1.0 [+0.5, +1.5] ≈", "–",
        "+1.0 [+0.5, +1.5]",
    ]  # fmt: skip


def test_curves_of_trainings_that_ended_at_different_rounds():
    def points(*losses):
        return [{"examples": 4 * i, "loss": loss} for i, loss in enumerate(losses, 1)]

    cells = [
        cell("retriever", "local_converged", [0, 1], seed)._replace(
            curves={"rank": points(*losses)}
        )
        for seed, losses in enumerate([(4.0, 2.0), (2.0, 1.0, 0.5)])
    ]
    figure = figures.learning_curves(cells)
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [4, 8, 12]
    assert line.get_ydata().tolist() == [3.0, 1.5, 0.5]
    figures.pyplot().close(figure)


def test_runs_from_before_regimes_had_their_name_are_read(tmp_path):
    kept = cell("retriever", "federated", [1, 0, 1, 1])
    save(tmp_path, kept)
    (path,) = tmp_path.rglob("cell.json")
    path.write_text(path.read_text().replace('"regime"', '"setting"'))
    assert load(tmp_path, "retriever", "federated", 0, 0).regime == "federated"
    (tmp_path / "config.json").write_text('{"name": "old", "settings": ["federated"]}')
    found = kept_config(tmp_path / "config.json")
    assert found == {"name": "old", "regimes": ["federated"]}


def test_topics_that_no_client_asks_about_have_no_scores_of_their_own():
    cells = [cell("retriever", "federated", [1, 0, 1], seed=seed) for seed in (0, 1)]
    weight = comparison.own_weight("own_em")
    for one, weights in zip(cells, ([0, 2, 1], [0, 1, 2]), strict=True):
        one.scores["own_em"], one.scores[weight] = one.scores["em"], np.array(weights)
    found = comparison.scores(cells, "own_em")
    assert found.values.shape == (2, 2), "the first is asked in no split"
    np.testing.assert_allclose(found.means, [1 / 3, 2 / 3])
    cells[1].scores[weight] = np.zeros(3)
    none = comparison.scores(cells, "own_em")
    assert none.values.shape == (2, 0) and np.isnan(none.means).all()
    assert comparison.estimate(cells, "own_em")["own_em"] is None


def test_differences_have_signs_and_zero_has_one_form():
    column = tables.difference("d")
    assert column.show({"difference": -1.26, "low": -2.0, "high": 0.04}) == "-1.3 [-2.0, +0.0]"
    # An end that rounds to zero keeps its side of zero.
    assert column.show({"difference": 1.4, "low": -0.04, "high": 2.8}) == "+1.4 [-0.0, +2.8]"
    # The interval of a difference that is zero everywhere is zero up to rounding.
    assert column.show({"difference": 0.0, "low": -7e-17, "high": -2e-17}) == "+0.0 [+0.0, +0.0]"
    assert column.show({"difference": None, "low": 0.0, "high": 0.0}) == tables.MISSING


def test_a_cost_that_is_not_declared_is_not_drawn():
    cells = [cell(name, "federated", [1, 0], seconds=2.0) for name in ("retriever", "own")]
    rows = comparison.strategy_rows(cells, REGIMES)
    rows[1]["flops"] = None
    rows[0]["flops"] = 3e12
    (ax,) = (ax for ax in figures.quality_against_cost(rows, "flops").axes if ax.get_title())
    assert [float(line.lines[0].get_xdata()[0]) for line in ax.containers] == [3.0]
