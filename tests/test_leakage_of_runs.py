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


def overfitting():
    """Both parts see few questions very often."""
    config = small()
    config.strategies, config.regimes = ("none", "retriever", "generator"), ("federated",)
    config.data.train_questions, config.data.own_questions = 16, 40
    config.training.rounds, config.training.local_steps = 10, 8
    config.learning_rates.federated.retriever = 3e-3
    config.learning_rates.federated.generator = 2e-2
    return config


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run(compare_strategies.EXPERIMENT, overfitting(), str(folder))


@pytest.fixture(scope="module")
def shadows(overfit):
    """Runs with other questions."""
    return [shadow(overfit, f"shadow{seed}", seed) for seed in (1, 2)]


def shadow(overfit, name, seed, **training):
    config = overfitting()
    config.name, config.strategies, config.data.sample_seed = name, ("generator",), seed
    config.data.update({"test_questions": 2, "own_questions": 0, "control_questions": 2})
    config.training.update(training)
    return str(run(compare_strategies.EXPERIMENT, config, str(overfit.parent)))


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


def test_shadow_models_of_other_questions_give_a_likelihood_ratio(overfit, shadows):
    config = asking(overfit)
    config.name, config.shadows = "by_shadows", shadows
    config.strategies = ("none", "generator")
    folder = run(leakage.EXPERIMENT, config, str(overfit.parent))
    with open(folder / "membership.csv", newline="") as file:
        rows = {(r["strategy"], r["signal"]): r for r in csv.DictReader(file)}
    assert float(rows["generator", "read"]["likelihood_auc"]) > 0.95
    assert rows["none", "read"]["likelihood_auc"] == ""
    cell = cells.load(folder, "generator", "federated", 0, 0)
    folders = [folder / "shadows" / f"shadow{i}" for i in (1, 2)]
    some = [cells.load(here, "generator", "federated", 0, 0) for here in folders]
    lab = leakage.lab(config, folder)
    asked = lab.questions
    for here, one in zip(folders, some, strict=True):
        trained_on = {e.id for e in lab.shadow(here.name).dataset.train}
        assert [*(one.scores["member"] > 0)] == [e.id in trained_on for e in asked]
        assert not np.array_equal(one.scores["read"], cell.scores["read"])
    # One question at a time: how much more certain than the shadow models, in their deviations.
    losses = [[float(c.scores["read"][i]) for c in some] for i in range(len(asked))]
    certain = [[np.log(np.exp(-x) / (1 - np.exp(-x))) for x in both] for both in losses]
    out = [[not c.scores["member"][i] for c in some] for i in range(len(asked))]
    left = [[x for x, o in zip(*both, strict=True) if o] for both in zip(certain, out, strict=True)]
    squares = sum((x - np.mean(both)) ** 2 for both in left for x in both if both)
    deviation = np.sqrt(squares / sum(len(both) - 1 for both in left if both))
    found = leakage.by_shadows(cell, some, "read")
    for nll, both, score in zip(cell.scores["read"].astype(float), left, found, strict=True):
        if not both:
            assert np.isnan(score)
        else:
            own = np.log(np.exp(-nll) / (1 - np.exp(-nll)))
            assert score == pytest.approx((own - np.mean(both)) / deviation, rel=1e-6)


def test_questions_of_all_shadow_models_are_left_out():
    def cell(*member):
        scores = {"read": np.arange(1.0, 4.0) + len(member), "member": np.array(member, float)}
        return cells.Cell("generator", "federated", 0, 0, scores, {}, [], None, {}, np.arange(3))

    shadows = [cell(1, 1, 0), cell(1, 0, 0)]
    shadows[1].scores["read"][2] += 1
    assert [*np.isnan(leakage.by_shadows(cell(1, 0, 1), shadows, "read"))] == [True, False, False]


def test_shadow_models_differ_in_their_questions_alone(overfit, shadows, tmp_path):
    config = asking(overfit)
    same, shorter = shadow(overfit, "same", 0), shadow(overfit, "shorter", 3, rounds=1)
    for folders, words in (
        (shadows[:1], "at least two shadow models"),
        ([*shadows, shadows[0]], "of different names"),
        ([*shadows, "nowhere"], "config.shadows: nowhere holds no run"),
        ([*shadows, same], "on the questions of .* another config.data.sample_seed"),
        ([*shadows, shorter], "differs from .* in config.training"),
    ):
        config.shadows = folders
        with pytest.raises(ConfigError, match=words):
            run(leakage.EXPERIMENT, config, str(tmp_path))


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
