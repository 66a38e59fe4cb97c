"""Runs that the docs keep go on with the configs of today, as docs/data/README.md says."""

import importlib
import shutil

import pytest
from printed import ROOT

from experiments.launch import settled_config

# folder, experiment, config, variant and settings of the command beside it
RUNS = [
    ("attacks", "attacks", "attacks", "", {"mode": ""}),
    ("leakage", "leakage", "leakage", "", {}),
    ("personalisation", "personalisation", "personalisation", "", {}),
    ("privacy", "privacy", "privacy", "", {}),
    ("privacy_generator", "privacy", "privacy", "", {"strategy": "generator"}),
    ("privacy_clipping", "privacy", "privacy", "clipping", {}),
    ("real", "compare_strategies", "compare_real", "", {}),
    ("real_hotpotqa", "compare_strategies", "compare_real", "hotpotqa", {}),
    ("real_shots", "compare_strategies", "compare_real", "shots", {}),
    ("research", "research", "research", "", {}),
    ("research_federated", "research", "research", "federated", {}),
    ("retrieval", "tune_retrieval", "tune_retrieval", "", {}),
]


@pytest.mark.parametrize(("folder", "experiment", "config", "variant", "settings"), RUNS)
def test_a_kept_run_goes_on(tmp_path, folder, experiment, config, variant, settings):
    get_config = importlib.import_module(f"configs.{config}").get_config
    asked = get_config(variant) if variant else get_config()
    asked.update({"name": folder} | settings)
    known = importlib.import_module(f"experiments.{experiment}").EXPERIMENT
    shutil.copy(ROOT / "docs/data" / folder / "config.json", tmp_path)
    settled_config(asked, tmp_path, (*known.free, "wandb"), known.defined)
