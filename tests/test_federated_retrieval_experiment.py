"""The experiment on silos that search together: what they find and send, and what is refused."""

import csv

import pytest

from configs import federated_retrieval as federated_retrieval_config
from experiments import federated_retrieval
from fedrag_jax.errors import ConfigError

ROW_AND_SCORE = 8  # bytes


def small():
    config = federated_retrieval_config.get_config()
    config.name, config.clients, config.data.test_questions = "small", 4, 40
    config.alphas, config.seeds, config.budgets = (1.0, float("inf")), (0, 1), (0, 1)
    return config


def test_the_experiment_counts_what_silos_find_and_send(tmp_path):
    folder = federated_retrieval.run(small(), str(tmp_path))
    with open(folder / "federated_retrieval.csv", newline="") as file:
        whole, *rows = csv.DictReader(file)
    assert [(r["alpha"], r["merge"], r["budget"]) for r in rows] == [
        (alpha, merge, budget)
        for alpha in ("1", "inf")
        for merge in ("score", "rrf")
        for budget in ("all", "1")
    ]
    finds = ("recall_at_1", "recall_at_5", "mrr")
    for row in rows:
        if (row["merge"], row["budget"]) == ("score", "all"):
            assert [row[name] for name in finds] == [whole[name] for name in finds]
        asked = 4 if row["budget"] == "all" else 1
        assert float(row["silos"]) == asked and float(row["query_bytes"]) == asked * 64 * 4
        assert float(row["answer_bytes"]) == asked * 10 * ROW_AND_SCORE
        assert float(row["published_bytes"]) == (0 if asked == 4 else 4 * 32 * 64 * 4)
        assert 0 < float(row["recall_at_5_low"]) < float(row["recall_at_5"]) <= 100
        parts = [float(row[f"{part}_bytes"]) for part in ("query", "answer", "passage", "total")]
        assert sum(parts[:3]) == pytest.approx(parts[3])
    table = (folder / "table.md").read_text()
    assert table.count("| rrf ") == 4 and "over 40 questions, means over 2 splits" in table


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seeds", (), "config.seeds is empty"),
        ("passages", 9, "config.passages must be at least 10"),
        ("budgets", (5,), "config.clients=4, or 0 for all; got 5"),
    ],
)
def test_the_experiment_refuses_at_once(tmp_path, name, value, words):
    config = small()
    config[name] = value
    with pytest.raises(ConfigError, match=words):
        federated_retrieval.run(config, str(tmp_path))
