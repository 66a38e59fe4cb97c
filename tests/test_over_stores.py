"""Tuned systems of a small comparison over other stores."""

import csv

import numpy as np
import pytest
from small import small

from configs.over_stores import get_config
from experiments import compare_strategies, over_stores
from experiments.lab import Lab
from experiments.loading import load_data
from experiments.run import run
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore

pytestmark = pytest.mark.slow  # whole experiments, if small ones


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    config = small()
    config.strategies, config.regimes = ("none", "retriever"), ("federated",)
    return run(compare_strategies.EXPERIMENT, config, str(tmp_path_factory.mktemp("runs")))


def asking(compared):
    config = get_config()
    config.of, config.seeds, config.regimes = str(compared), (0,), ("federated",)
    config.stores.bm25, config.stores.hybrid = ("none",), ("none", "retriever")
    config.wandb.mode = "disabled"
    return config


def test_systems_answer_from_each_store_and_are_not_trained_again(compared):
    tuned = [*(compared / "tuned").rglob("tuned.safetensors")]
    before = [path.stat().st_mtime_ns for path in tuned]
    folder = run(over_stores.EXPERIMENT, asking(compared), str(compared.parent))
    assert [path.stat().st_mtime_ns for path in tuned] == before
    with open(folder / "over_stores.csv", newline="") as file:
        rows = {(r["store"], r["strategy"]): r for r in csv.DictReader(file)}
    assert [*rows] == [
        ("vectors", "none"), ("vectors", "retriever"), ("bm25", "none"), ("hybrid", "none"),
        ("hybrid", "retriever"),
    ]  # fmt: skip
    with open(compared / "strategies.csv", newline="") as file:
        own = {r["strategy"]: r["recall_at_5"] for r in csv.DictReader(file)}
    assert {s: rows["vectors", s]["recall_at_5"] for s in own} == own

    config = small()
    config.strategies, config.regimes = ("none", "retriever"), ("federated",)
    lab = Lab(config, load_data(config), compared)
    (system,), _ = lab.tuned_systems("retriever", "federated", 0, 0)
    words, vectors = BM25Store(), FaissStore(lab.system(0).retriever.vectors.shape[1])
    words.add(system.retriever.passages)
    vectors.add(system.retriever.passages, system.retriever.vectors)
    for store, strategy in (
        (words, "none"),
        (HybridStore([vectors, words]), "none"),
        (HybridStore([vectors, words]), "retriever"),
    ):
        asked = system if strategy == "retriever" else lab.system(0)
        for metric, scores in evaluate(asked.over(store), lab.dataset.test).items():
            found = float(rows[store.kind, strategy][metric])
            assert found == pytest.approx(100 * float(np.nanmean(scores))), (store.kind, metric)
    by = {p: rows["hybrid", "retriever"][f"recall_at_5_by_{p}"] for p in ("difference", "p_holm")}
    both = [float(rows["hybrid", s]["recall_at_5"]) for s in ("retriever", "none")]
    assert float(by["difference"]) == pytest.approx(both[0] - both[1]) and by["p_holm"]
    for store, strategy in rows:
        over = rows[store, strategy]["recall_at_5_over_difference"]
        here, there = (float(rows[s, strategy]["recall_at_5"]) for s in (store, "vectors"))
        assert (store == "vectors" and over == "") or float(over) == pytest.approx(here - there)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"of": "nowhere"}, "config.of: nowhere holds no run"),
        ({"seeds": (1,)}, r"no finished cell \(none, federated, seed1\)"),
        ({"regimes": ("local",)}, "'local' has a system for each client"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(
    compared, tmp_path, change, message
):
    config = asking(compared)
    config.update(change)
    with pytest.raises(ConfigError, match=message):
        run(over_stores.EXPERIMENT, config, str(tmp_path))
    assert not [*tmp_path.iterdir()]
    config = asking(compared)
    config.stores.bm25 = ("generator",)
    with pytest.raises(ConfigError, match=r"no finished cell \(generator"):
        run(over_stores.EXPERIMENT, config, str(tmp_path))
