"""What tuned systems of a small comparison give away: training questions and passages."""

import csv

import numpy as np
import pytest
from small import small

from configs.leakage import get_config
from experiments import compare_strategies, leakage
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.leakage.roc import auc

pytestmark = pytest.mark.slow  # whole experiments, if small ones


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """A run in which both parts have seen few questions very often."""
    config = small()
    config.strategies, config.regimes = ("none", "retriever", "generator"), ("federated",)
    config.data.train_questions, config.data.own_questions = 16, 40
    config.training.rounds, config.training.local_steps = 10, 8
    config.learning_rates.federated.retriever = 3e-3
    config.learning_rates.federated.generator = 2e-2
    return run(compare_strategies.EXPERIMENT, config, str(tmp_path_factory.mktemp("runs")))


def asking(of):
    config = get_config()
    config.of, config.seeds, config.regimes = str(of), (0,), ("federated",)
    config.wandb.mode = "disabled"
    return config


def test_members_of_overfit_systems_are_told_by_the_part_that_was_tuned(overfit):
    folder = run(leakage.EXPERIMENT, asking(overfit), str(overfit.parent))
    with open(folder / "membership.csv", newline="") as file:
        rows = {(r["strategy"], r["signal"]): r for r in csv.DictReader(file)}
    assert {r["members"] for r in rows.values()} == {"16"}
    assert {r["others"] for r in rows.values()} == {"40"}

    def attack(strategy, signal, how="calibrated"):
        return float(rows[strategy, signal][f"{how}_auc"])

    assert attack("generator", "read", "loss") > 0.95
    assert attack("retriever", "ranked", "loss") > 0.95
    assert min(attack("generator", "read"), attack("retriever", "ranked")) > 0.75
    assert all(0.2 < attack("none", signal, "loss") < 0.7 for signal in ("read", "ranked"))
    # A retriever's tuning changes nothing about an answer without passages, nor the other way round.
    assert attack("retriever", "closed") == attack("generator", "ranked") == 0.5
    assert rows["none", "closed"]["calibrated_auc"] == ""
    cell = cells.load(folder, "generator", "federated", 0, 0)
    member, before = cell.scores["member"] > 0, cells.load(folder, "none", "federated", 0, 0)
    gain = before.scores["read"] - cell.scores["read"]
    assert attack("generator", "read") == pytest.approx(auc(gain[member], gain[~member]))
    assert np.isfinite(cell.scores["ranked"]).all()
    with open(folder / "repeated.csv", newline="") as file:
        said = {r["strategy"]: float(r["said"]) for r in csv.DictReader(file)}
    assert [*said] == ["none", "retriever", "generator"]
    assert said["generator"] == cell.controls["said"] <= 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"questions": -1}, "config.questions must be at least 0"),
        ({"prompted": 0}, "config.prompted must be at least 1"),
        ({"strategies": ("generator",)}, "needs 'none'"),
        ({"of": "nowhere"}, "holds no run"),
        ({"regimes": ("centralised",)}, "no finished cell"),
    ],
)
def test_what_cannot_be_attacked_is_refused(overfit, tmp_path, change, words):
    config = asking(overfit)
    config.update(change)
    with pytest.raises(ConfigError, match=words):
        run(leakage.EXPERIMENT, config, str(tmp_path))
