"""What training gives away: the experiment from one end to the other, and what it refuses."""

import csv
from importlib.util import find_spec

import numpy as np
import pytest
from ml_collections import ConfigDict
from small import small_privacy

from experiments import privacy
from experiments.privacy_lab import crowd, labels_by_heart
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.leakage import roc
from fedrag_jax.tracking.ledger import Cost


@pytest.mark.slow
def test_an_experiment_is_run_and_goes_on(tmp_path, capsys):
    pytest.importorskip("dp_accounting")
    folder = run(privacy.EXPERIMENT, small_privacy(), str(tmp_path))
    with open(folder / "privacy.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["untuned", "fedavg", "dp_8"]
    assert float(rows["dp_8"]["epsilon"]) == pytest.approx(8.0, rel=1e-2)
    assert rows["fedavg"]["epsilon"] == ""
    # What a client sends plainly has its words; under noise it has fewer.
    assert float(rows["fedavg"]["words"]) > 0.95 > float(rows["dp_8"]["words"])
    assert float(rows["untuned"]["calibrated_auc"]) == 0.5
    # Two rounds may raise the loss; what the columns hold is tested below.
    assert float(rows["untuned"]["fall_trained"]) == 0 != float(rows["fedavg"]["fall_trained"])
    for row in rows.values():
        for attack in ("loss", "clients", "passages"):
            low, value, high = (float(row[f"{attack}_auc{end}"]) for end in ("_low", "", "_high"))
            assert 0 <= low <= value <= high <= 1
    assert (folder / "privacy.png").exists()
    capsys.readouterr()
    config = small_privacy()
    config.variants["int8"] = ConfigDict({"options": {"up": "int8"}})
    run(privacy.EXPERIMENT, config, str(tmp_path))
    told = capsys.readouterr().out
    assert "int8, federated" in told and "fedavg, federated" not in told


def test_the_fall_of_the_loss_is_of_questions_that_were_trained_on():
    absent = np.nan  # a test question, which belongs to no client
    scores = {
        "calibrated": np.array([absent, 1.0, 2.0, 9.0, -1.0, 0.5]),
        "took_part": np.array([absent, 1, 1, 1, 0, 0]),
        "fresh": np.array([absent, 0, 0, 1, 0, 1]),
    }
    cell = cells.Cell("v", "federated", 0, 0, scores, {}, [], Cost(), {}, np.arange(6))
    assert privacy.falls([cell]) == {"fall_trained": 1.5, "fall_others": -0.25}


def test_a_store_is_asked_the_same_questions_in_all_seeds():
    rng = np.random.default_rng(0)
    one = roc.Attack(rng.random(30), np.arange(30) % 2 == 0, np.arange(30))

    def width(attack, models):
        _, low, high = privacy.measured(attack, roc.auc, [one] * models)
        return high - low

    # Three equal models then tell no more than one; where each seed has its own questions, they do.
    assert width("passages", 3) == pytest.approx(width("passages", 1), rel=0.1)
    assert width("loss", 3) < 0.8 * width("loss", 1)


def test_questions_to_a_store_are_a_sample(tmp_path):
    lab = privacy.lab(small_privacy(), tmp_path)
    rows = privacy.asked_of_store(lab)
    assert len({*rows}) == lab.config.asked < max(rows) + 1 <= len(lab.dataset.test)


def test_who_trains_and_who_does_not():
    config = small_privacy()
    found = crowd(config, synthetic.generate(), split=0)
    assert found.trains.shape == (1 + config.shadows, 8)
    assert (found.trains.sum(1) == 4).all()
    on = found.trained_on()
    assert not on[:, found.fresh].any() and found.fresh.sum() == 8 * 2
    for user in range(8):
        rows = found.rows(user)
        assert (on[0, rows] == found.trains[0, user]).all() and not found.fresh[rows].any()
    # Every question that may be trained on is in half of the shadow models.
    assert (on[1:, ~found.fresh].sum(0) == config.shadows // 2).all()


def test_a_client_keeps_questions_to_train_on():
    config = small_privacy()
    config.fresh, world = 200, synthetic.generate()
    with pytest.raises(ConfigError, match=r"config.fresh is 200, and a client holds 200"):
        crowd(config, world, split=0)


def test_labels_by_heart_are_those_of_others():
    world = synthetic.generate()
    found = labels_by_heart(world, 0)
    pairs = [*zip(world.train, found.train, strict=True)]
    assert all(a.question == b.question and a.topic == b.topic for a, b in pairs)
    assert sum(a.positive_ids == b.positive_ids for a, b in pairs) < 0.05 * len(pairs)
    labels = [sorted((e.positive_ids, e.answers) for e in some.train) for some in (world, found)]
    assert labels[0] == labels[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": ConfigDict()}, "config.variants is empty"),
        ({"strategy": "both"}, "config.strategy: choose among"),
        ({"shadows": 2}, "config.shadows must be 0 or an even number of at least 4, got 2"),
        ({"primary_metric": "bleu"}, "config.primary_metric: 'bleu' unknown"),
        ({"victims": 5}, "config.victims must be between 1 and 4, got 5"),
        ({"variants": ConfigDict({"odd": {"steps": 3}})}, r"config.variants.odd has \['steps'\]"),
        pytest.param(
            {"variants": ConfigDict({"dp": {"algorithm": "dpfedavg", "options": {"delta": 0.3}}})},
            "delta 0.3 is not below 1/4",
            marks=pytest.mark.skipif(find_spec("dp_accounting") is None, reason="no dp-accounting"),
        ),
        (
            {
                "variants": ConfigDict(
                    {"dp": {"algorithm": "dpfedavg", "options": {"epsilon": 3.0}}}
                )
            },
            "config.variants.dp: .* an ε needs a δ",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, words, tmp_path):
    config = small_privacy()
    for name, value in change.items():
        config[name] = value
    with pytest.raises(ConfigError, match=words):
        run(privacy.EXPERIMENT, config, str(tmp_path))
