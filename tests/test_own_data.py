"""The programs on other data than the built-in world: folders of one's own, real questions."""

import csv
import json
import pathlib
import re

import numpy as np
import pytest
from small import own_folder, read, small

from experiments import compare_strategies, lab
from experiments.reporting import cells
from experiments.run import run
from fedrag_jax.errors import ConfigError, DataError


@pytest.mark.slow
def test_a_folder_without_labels_topics_or_one_hop_questions(tmp_path, capsys):
    config = small()
    config.data.name = own_folder(tmp_path, hops=2)
    config.strategies = ("none", "retriever", "joint_token")
    config.regimes = ("federated",)
    folder = run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    assert "retriever left out: needs gold passages, and 36 of 36" in capsys.readouterr().out
    assert {row["strategy"] for row in read(folder)} == {"none", "joint_token"}
    config.strategies = ("retriever",)
    with pytest.raises(ConfigError, match="none is left; add some that need no gold passages"):
        run(compare_strategies.EXPERIMENT, config, str(tmp_path))
    for row in read(folder):
        assert row["em"] and not row["recall_at_5"] and not row["mrr"]
    assert re.search(r"\| +– \| +– \|", (folder / "table.md").read_text())
    own_folder(tmp_path, labelled=True)
    with pytest.raises(DataError, match=r"holds results of other data"):
        run(compare_strategies.EXPERIMENT, config, str(tmp_path))


def test_ones_own_jsonl_folder_runs(tmp_path):
    data = tmp_path / "mine"
    data.mkdir()
    rng = np.random.default_rng(0)
    with open(data / "passages.jsonl", "w") as file:
        for i in range(30):
            text = f"The {i} Tower was designed by Ann {i} in 1700."
            file.write(json.dumps({"id": f"p{i}", "title": f"Tower {i}", "text": text}) + "\n")
    with open(data / "questions.jsonl", "w") as file:
        for i in range(30):
            question = {"id": f"q{i}", "question": f"Who designed the {i} Tower?",
                        "answers": [f"Ann {i}"], "positive_ids": [f"p{i}"],
                        "topic": str(rng.choice(["a", "b"]))}  # fmt: skip
            file.write(json.dumps(question) + "\n")
    config = small()
    config.data.name = str(data)
    config.strategies = ("none", "retriever")
    config.regimes = ("federated",)
    config.data.train_questions = 0
    rows = read(run(compare_strategies.EXPERIMENT, config, str(tmp_path / "runs")))
    assert len(rows) == 2


def real_data():
    import os

    folder = pathlib.Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
    return (folder / "squad.questions.jsonl.gz").exists()


@pytest.mark.slow
@pytest.mark.skipif(not real_data(), reason="no squad in $FEDRAG_DATA or ../shared/data")
def test_query_side_tuning_on_real_questions(tmp_path):
    """The program behind `make retrieval`, with the small encoder in MiniLM's place."""
    from configs import tune_retrieval as real
    from experiments import tune_retrieval

    config = real.get_config()
    config.datasets = ("squad",)
    config.regimes, config.seeds = ("federated", "local_converged"), (0,)
    config.clients, config.converged.cap, config.converged.patience = 2, 1, 1
    config.wandb.mode = "disabled"
    config.retriever, config.large_batch = "builtin:encoder", 2
    config.methods = ("in_batch", "mined", "large_batch")
    config.rounds, config.local_steps, config.learning_rates = 1, 1, (1e-4,)
    config.train_questions, config.test_questions, config.min_examples = 300, 40, 2
    config.validation_questions = 40
    folder = run(tune_retrieval.EXPERIMENT, config, str(tmp_path))
    with open(folder / "retrieval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["dataset"], r["regime"], r["method"]) for r in rows] == [
        ("squad", "", "untuned"), ("squad", "federated", "in_batch"),
        ("squad", "federated", "mined"), ("squad", "federated", "large_batch"),
        ("squad", "local_converged", "in_batch"), ("squad", "local_converged", "mined"),
    ]  # fmt: skip
    assert {r["learning_rate"] for r in rows[1:]} == {"0.0001"}
    for row in rows:
        ranks = [float(row[k]) for k in ("recall_at_1", "mrr", "recall_at_20")]
        assert 0 <= ranks[0] <= ranks[1] <= ranks[2] <= 100
        assert float(row["recall_at_5_low"]) <= float(row["recall_at_5_high"])
    # Forty questions of many articles, not of the first.
    scores = cells.load(folder / "squad", "untuned", "federated", 0, 0)
    assert len(scores.clusters) == 40 and len({*scores.clusters.tolist()}) > 15
    run(tune_retrieval.EXPERIMENT, config, str(tmp_path))  # nothing is computed again
    with open(folder / "retrieval.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_controls_of_questions_of_one_kind(tmp_path):
    from fedrag_jax.data import datasets
    from fedrag_jax.rag import RAGSystem

    dataset = datasets.load(own_folder(tmp_path, labelled=True, hops=2))
    system = RAGSystem.build(dataset.passages, dataset.train)
    controls = lab.control_scores(system, dataset.test)
    assert controls.keys() == {"closed_book_em", "distractor_em", "gold_em_two_hop"}
    assert controls["gold_em_two_hop"] > 20 > controls["distractor_em"]
