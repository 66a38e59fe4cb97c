"""Learning rates: which are searched, which win, and which are not for other models."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from small import small

from experiments import loading
from fedrag_jax.errors import ConfigError


def test_rates_that_diverge_are_left_out(tmp_path, capsys):
    """Two pairs of seeds: a rate at which either diverges is none."""
    from experiments import search
    from experiments.rates import SEARCHES, chosen_rate
    from fedrag_jax.errors import DivergenceError
    from fedrag_jax.strategies import strategies, strategy

    @dataclasses.dataclass
    class Tuner:
        rate: float
        seed: int
        folder: pathlib.Path = tmp_path
        costs: dict = dataclasses.field(default_factory=dict)

    class Run:
        config, dataset = small(), None

        def members(self, regime):
            return [None]

        def tuner(self, rates, regime, seed, split, client):
            return Tuner(rates("task", "part"), seed)

    @strategy.strategy()
    def by_rate(base, dataset):
        return (yield "task")

    def tune_together(asked):
        return [
            DivergenceError("not finite") if t.rate > 1 + t.seed else t.rate + t.seed / 4
            for t, _ in asked
        ]

    run = Run()
    run.config.seeds = (0, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "tune_together", tune_together)
        patch.setattr(strategies, "retriever", by_rate)
        # A retriever is judged by its ranking: `evaluate`, which answers, would raise TypeError here.
        patch.setattr(
            search, "evaluate_retrieval", lambda rate, some: {"mrr": np.array([rate, np.nan])}
        )
        trials = search.Trials(run, "federated", SEARCHES[0], [0, 0], [1])
        assert trials.judge([0.5, 0.75, 1.5]) == [62.5, 87.5, -np.inf]
        assert trials.systems[0.5] == [0.5, 0.75]
        assert "federated, retriever, 1.5: diverged" in capsys.readouterr().out
        assert chosen_rate(tmp_path / "rate.json", [0.5, 1.0, 2.0], trials.judge, "rank", []) == 1.0
        assert "outermost" not in capsys.readouterr().out  # the next one diverges
        with pytest.raises(ConfigError, match=r"diverged at all rates of \[1.33.*, 2.0, 3.0\]"):
            chosen_rate(tmp_path / "none.json", [2, 3], trials.judge, "rank", [])


@pytest.mark.parametrize(
    "grid, peak, chosen",
    [
        ([1.0, 4.0, 16.0], 6.0, 8.0),  # between two of the grid
        ([1.0, 4.0, 16.0], 4.0, 4.0),
        ([1.0, 4.0], 60.0, 64.0),  # beyond its end
        ([1.0, 4.0, 16.0], 0.3, 0.25),
        ([1.0], 9.0, 1.0),
    ],
)
def test_the_best_rate_lies_inside_a_grid_of_factor_two(tmp_path, grid, peak, chosen):
    from experiments.rates import at_edge, chosen_rate

    def judge(rates):
        return [-abs(np.log(rate / peak)) for rate in rates]

    path = tmp_path / "rates.json"
    assert chosen_rate(path, grid, judge, "some", []) == pytest.approx(chosen)
    rates = sorted(float(r) for r in json.loads(path.read_text())["scores"])
    place = rates.index(json.loads(path.read_text())["chosen"])
    assert not at_edge(path)
    if len(grid) > 1:
        assert rates[place + 1] / rates[place] < 2.02 and rates[place] / rates[place - 1] < 2.02


def test_a_best_rate_at_an_edge_is_said(tmp_path, capsys):
    from experiments.rates import at_edge, chosen_rate

    chosen_rate(tmp_path / "rates.json", [1.0, 2.0], lambda rates: [-r for r in rates], "some", [])
    assert at_edge(tmp_path / "rates.json")
    assert "some: the best rate 0.0625 is the outermost that was tried" in capsys.readouterr().out


def test_grids_are_those_of_the_models():
    from experiments.search import LAWTON, PLAIN_SGD, usual_grid

    config = small()
    for part in ("generator", "retriever"):
        grid = usual_grid(config, part, "federated")
        np.testing.assert_allclose(np.diff(np.log(grid)), np.log(4), rtol=0.01)
    config.models.retriever = "minilm"
    assert usual_grid(config, "retriever", "local") == LAWTON
    assert usual_grid(config, "generator", "local") != LAWTON
    # SGD wants other rates than Adam, whatever the model.
    assert usual_grid(config, "retriever", "federated:scaffold") == PLAIN_SGD["retriever"]
    assert usual_grid(config, "retriever", "federated:fedprox") == LAWTON


def test_rates_of_the_built_in_models_are_not_lent_in_silence(caplog):
    config = small().lock()  # as from the command line
    loading.warn_of_borrowed_rates(config)
    assert not caplog.messages
    config.models.retriever = "minilm"
    loading.warn_of_borrowed_rates(config)
    assert len(caplog.messages) == 1 and "can ruin minilm; search those" in caplog.messages[0]
    config.learning_rates.federated.retriever = 1e-5
    loading.warn_of_borrowed_rates(config)
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_only_what_the_strategies_train_is_searched(tmp_path):
    from experiments import search

    config = small()
    config.regimes, config.strategies, config.mode = ("federated",), ("none", "lsr"), "ensemble"
    folder = search.run(config, str(tmp_path), {"lsr": [1e-3]}, questions=20)
    chosen = json.loads((folder / "learning_rates.json").read_text())["chosen"]
    assert [*chosen["federated"]] == ["lsr"]


@pytest.mark.slow
def test_learning_rates_are_those_of_the_best_validation_scores(tmp_path):
    """The second phase is searched under the first that was chosen, and nothing is done twice."""
    from experiments import search

    config = small()
    config.regimes, config.strategies = ("federated",), ("independent", "two_phase")
    grids = {
        "retriever": [5e-4, 1e-3],
        "generator": [1e-3],
        "marginal_generator": [1e-3],
        "marginal_retriever": [1e-3],
    }
    folder = search.run(config, str(tmp_path), grids, questions=40)
    result = json.loads((folder / "learning_rates.json").read_text())
    chosen, scores = result["chosen"]["federated"], result["validation"]["federated"]
    for name, grid in grids.items():
        assert {str(rate) for rate in grid} <= {*scores[name]}
        assert scores[name][str(chosen[name])] == max(scores[name].values())
        assert result["seconds"]["federated"][name] > 0
    assert len(set(scores["retriever"].values())) > 1  # there was something to choose
    first = chosen["marginal_generator"]
    tuned = folder / "tuned" / "federated-seed0"
    (second,) = tuned.glob("after-*/second_phase-*")
    assert second.parent.name == f"after-{first:g}"
    kept = (second / "rag_token_query" / "cost.json").read_text()
    search.run(config, str(tmp_path), grids, questions=40)
    assert (second / "rag_token_query" / "cost.json").read_text() == kept


def test_a_strategy_costs_the_searches_for_its_own_rates():
    from experiments.compare_report import search_seconds

    config = small()
    known = {"retriever": 8, "generator": 200, "marginal_generator": 300, "marginal_retriever": 100}
    config.search_seconds = {"centralised": known, "federated": {"retriever": 9}}
    expected = {"none": 0, "retriever": 8, "generator": 200, "independent": 208, "two_phase": 400,
                "joint_token": 400, "pdist": 8, "rag_token": 208, "ra_dit": None}  # fmt: skip
    assert {name: search_seconds(config, name, "centralised") for name in expected} == expected
    assert search_seconds(config, "retriever", "federated") == 9
    assert search_seconds(config, "independent", "federated") is None  # half of it is not known
