"""The table of ways to train against ways to answer, small."""

import csv

import numpy as np
import pytest
from small import small_modes

from experiments import inference_modes, report
from experiments.lab import Lab
from experiments.loading import load_data
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate

pytestmark = pytest.mark.slow  # whole experiments, if small ones


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(inference_modes.EXPERIMENT, small_modes(), str(tmp_path_factory.mktemp("runs")))


def read(folder):
    with open(folder / "inference_modes.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_pair(finished):
    rows = read(finished)
    assert [(row["strategy"], row["mode"]) for row in rows] == [
        (strategy, mode) for strategy in ("none", "ralt") for mode in ("concatenated", "rag_token")
    ]
    em = {}
    for row in rows:
        for metric in ("em", "f1"):
            low, value, high = (
                float(row[name]) for name in (f"{metric}_low", metric, f"{metric}_high")
            )
            assert 0 <= low <= value <= high <= 100
        assert float(row["seconds"]) > 0 and row["questions"] == "30"
        em[row["strategy"], row["mode"]] = float(row["em"])
        if row["mode"] != "concatenated":
            difference = em[row["strategy"], row["mode"]] - em[row["strategy"], "concatenated"]
            assert float(row["difference"]) == pytest.approx(difference)
    text = (finished / "table.md").read_text()
    assert "At a glance" in text and "EM against concatenated" in text


def test_cells_hold_what_a_mode_answers_with_the_beams_of_the_config(finished):
    config = small_modes()
    run = Lab(config, load_data(config), finished)
    expected = evaluate(run.system(0), run.dataset.test, mode="rag_token", beams=2)
    cell = cells.load(finished, "none", "rag_token", 0, 0)
    np.testing.assert_array_equal(cell.scores["f1"], expected["f1"])


def test_what_is_finished_is_read_back(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("cell.json")}
    trained = {path: path.stat().st_mtime_ns for path in finished.rglob("tuned.safetensors")}
    assert len(before) == 4 and len(trained) == 1
    config = small_modes()
    config.modes = (*config.modes, "vote")
    run(inference_modes.EXPERIMENT, config, str(finished.parent))
    for path, time in (before | trained).items():
        assert path.stat().st_mtime_ns == time
    assert len(read(finished)) == 6
    (finished / "table.md").unlink()
    assert "table.md" in report.rebuild(finished)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("modes", ("fusion",), "config.modes: .*fusion.* unknown"),
        ("modes", (), "config.modes is empty"),
        ("regimes", ("local",), "config.regimes must be one, and not local"),
        ("beams", -1, "config.beams must be at least 0, got -1"),
        ("strategies", ("magic",), "config.strategies: unknown strategy 'magic'"),
    ],
)
def test_refuses_what_would_fail_later(tmp_path, name, value, message):
    config = small_modes()
    config[name] = value
    with pytest.raises(ConfigError, match=message):
        run(inference_modes.EXPERIMENT, config, str(tmp_path))
    assert not list(tmp_path.iterdir())
