"""Learning rates: which are searched, which win, and which are not for other models."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from small import small

from experiments import inputs
from fedrag_jax.errors import ConfigError


def test_rates_that_diverge_are_left_out(tmp_path, monkeypatch, capsys):
    from experiments import choose_learning_rates
    from fedrag_jax.errors import DivergenceError
    from fedrag_jax.evaluation import evaluator
    from fedrag_jax.strategies import strategies, tuner

    @dataclasses.dataclass
    class Tuner:
        rate: float
        folder: pathlib.Path = tmp_path

    class Run:
        config, dataset = small(), None

        def tuner(self, setting, seed, split, client, rate):
            return Tuner(rate("task", "part"))

    @strategies.strategy
    def by_rate(base, dataset):
        return (yield "task")

    def tune_together(asked):
        return [DivergenceError("not finite") if t.rate > 1 else t.rate for t, _ in asked]

    monkeypatch.setattr(tuner, "tune_together", tune_together)
    monkeypatch.setattr(
        evaluator, "evaluate", lambda rate, some, mode: {"mrr": np.array([rate, np.nan])}
    )
    search = choose_learning_rates.search
    best, systems, scores = search(Run(), "federated", by_rate, "mrr", [0.5, 0.75, 2], [0], [1])
    assert (best, systems, scores) == (0.75, [0.75], {0.5: 50.0, 0.75: 75.0})
    assert "lr 2        diverged" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"every rate of \[2, 3\] diverged"):
        search(Run(), "federated", by_rate, "mrr", [2, 3], [0], [1])


def test_grids_are_those_of_the_models():
    from experiments.choose_learning_rates import LAWTON, usual_grid

    config = small()
    grid = usual_grid(config, "generator")
    assert (len(grid), grid[0], grid[-1]) == (9, 1e-4, 1e-1)
    grid = usual_grid(config, "retriever")
    assert (len(grid), grid[0], grid[-1]) == (9, 1e-5, 1e-2)
    np.testing.assert_allclose(np.diff(np.log(grid)), np.log(1000) / 8, rtol=0.01)
    config.models.retriever = "minilm"
    assert usual_grid(config, "retriever") == LAWTON
    assert usual_grid(config, "generator") != LAWTON


def test_rates_of_the_built_in_models_are_not_lent_in_silence(caplog):
    config = small().lock()  # as from the command line
    inputs.warn_of_borrowed_rates(config)
    assert not caplog.messages
    config.models.retriever = "minilm"
    inputs.warn_of_borrowed_rates(config)
    assert len(caplog.messages) == 1 and "can ruin minilm; search those" in caplog.messages[0]
    config.learning_rates.federated.retriever = 1e-5
    inputs.warn_of_borrowed_rates(config)
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_only_what_the_strategies_train_is_searched(tmp_path):
    from experiments import choose_learning_rates

    config = small()
    config.settings, config.strategies, config.mode = ("federated",), ("none", "lsr"), "ensemble"
    folder = choose_learning_rates.run(config, str(tmp_path), {"lsr": [1e-3, 1e-9]}, questions=20)
    chosen = json.loads((folder / "learning_rates.json").read_text())["chosen"]
    assert [*chosen["federated"]] == ["lsr"]


@pytest.mark.slow
def test_learning_rates_are_those_of_the_best_validation_scores(tmp_path):
    """The second phase is searched under the first that was chosen, and nothing is done twice."""
    from experiments import choose_learning_rates

    config = small()
    config.settings, config.strategies = ("federated",), ("independent", "two_phase")
    grids = {
        "retriever": [1e-9, 1e-3],
        "generator": [1e-3],
        "marginal_generator": [1e-3, 1e-9],
        "marginal_retriever": [1e-3],
    }
    folder = choose_learning_rates.run(config, str(tmp_path), grids, questions=40)
    result = json.loads((folder / "learning_rates.json").read_text())
    chosen, scores = result["chosen"]["federated"], result["validation"]["federated"]
    for name, grid in grids.items():
        assert list(scores[name]) == [str(rate) for rate in grid]
        assert scores[name][str(chosen[name])] == max(scores[name].values())
    assert len(set(scores["retriever"].values())) == 2  # there was something to choose
    first = chosen["marginal_generator"]
    tuned = folder / "tuned" / "federated-seed0"
    (second,) = tuned.glob("after-*/second_phase-*")
    assert second.parent.name == f"after-{first:g}"
    kept = (second / "rag_token_query" / "cost.json").read_text()
    choose_learning_rates.run(config, str(tmp_path), grids, questions=40)
    assert (second / "rag_token_query" / "cost.json").read_text() == kept
