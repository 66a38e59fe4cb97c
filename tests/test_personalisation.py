"""Personalised models: the experiment from one end to the other, and how clients are counted."""

import csv
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from small import small_personalisation

from experiments import personalisation
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.errors import ConfigError
from fedrag_jax.tracking.ledger import Cost


@pytest.mark.slow
def test_each_method_is_compared_with_clients_alone(tmp_path, capsys):
    folder = run(personalisation.EXPERIMENT, small_personalisation(), str(tmp_path))
    with open(folder / "personalisation.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [*rows] == [
        "federated", "fine_tuned", "ditto", "ditto_1", "local_head", "local_converged"
    ]  # fmt: skip
    for method, row in rows.items():
        assert 0 < float(row["mrr"]) <= 100 and row["em"] == ""
        if method != personalisation.ALONE:
            assert int(row["better"]) + int(row["worse"]) <= 4
            assert row["by_difference"]
    sent = {method: float(row["bytes_up"]) for method, row in rows.items()}
    assert sent["local_converged"] == 0
    # Fine-tuned clients send in two of four rounds; a head stays at home.
    assert sent["fine_tuned"] == sent["federated"] / 2
    assert sent["ditto"] == sent["local_head"] == sent["federated"]
    capsys.readouterr()
    run(personalisation.EXPERIMENT, small_personalisation(), str(tmp_path))
    assert "retriever, ditto" not in capsys.readouterr().out


def test_fine_tuning_has_a_rate_of_its_own(monkeypatch):
    monkeypatch.setattr(personalisation.regimes, "adamw", lambda rates: rates["query"])
    task = types.SimpleNamespace(trainable={"query": 0})
    optimizer = personalisation.fine_tuning(task, rounds=8, together=6, before=8.0, rate=1.0)
    assert [optimizer(round) for round in range(8)] == [8, 7, 6, 5, 4, 3, 1, 0.5]


def cell(seed, **scores):
    controls = {f"client_{number}": score for number, score in scores.items()}
    return cells.Cell(
        "retriever", "ditto", seed, seed, {}, controls, [], Cost(), {}, np.zeros(0, np.int32)
    )


def test_clients_are_counted_seed_by_seed():
    found = [cell(0, a=50.0, b=30.0), cell(1, a=20.0, b=20.0), cell(2, a=0.0)]
    alone = [cell(1, a=20.0, b=10.0), cell(0, a=40.0, b=60.0)]
    assert personalisation.better_and_worse(found, alone) == {"better": 2, "worse": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ConfigDict()}, "config.methods is empty"),
        ({"strategies": ("joint_token",)}, r"config.strategies: \['joint_token'\] unknown"),
        (
            {"methods": ConfigDict({"odd": {"algorithm": "scaffold"}})},
            "config.methods.odd.algorithm must be one of .* got 'scaffold'",
        ),
        ({"learning_rates": ()}, "config.learning_rates is empty"),
        (
            {
                "methods": ConfigDict(
                    {"tuned": {"algorithm": "fine_tuned", "options": {"together": 2}}}
                )
            },
            "config.methods.tuned fine-tunes the federated model, so it needs the method 'federated'",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, words, tmp_path):
    config = small_personalisation()
    for name, value in change.items():
        config[name] = value
    with pytest.raises(ConfigError, match=words):
        run(personalisation.EXPERIMENT, config, str(tmp_path))
