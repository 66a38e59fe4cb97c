"""The tables and figures of a split, before anything is trained."""

import csv
import types

import pytest
from small import own_folder, small

from experiments import lab, loading, partition_statistics
from fedrag_jax.errors import ConfigError


def test_statistics_are_those_of_the_split_that_is_trained_on(tmp_path):
    config = small()
    config.seeds, config.federated.clients, config.federated.alpha = (0, 3), 6, 0.1
    folder = partition_statistics.run(config, str(tmp_path))
    with open(folder / "partition.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["partition"] for r in rows] == ["alpha 0.1, seed 0", "alpha 0.1, seed 3", "IID"]
    split = lab.Lab.clients
    some = types.SimpleNamespace(config=config, dataset=loading.load_data(config))
    for row, seed in zip(rows, config.seeds, strict=False):
        expected = split(some, "federated", seed).statistics()
        assert {k: float(row[k]) for k in expected} == pytest.approx(expected)
    assert float(rows[0]["total_variation"]) > 2 * float(rows[2]["total_variation"])
    assert (folder / "partition.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in (folder / "partition.md").read_text().splitlines()]
    assert ["|", "IID", "|", "6", "|", "160", "|", "26", "|", "27.0", "|", "27"] in [
        line[:12] for line in table
    ]
    config.seeds = ()
    with pytest.raises(ConfigError, match=r"config.seeds is empty"):
        partition_statistics.run(config, str(tmp_path))


def test_statistics_of_questions_without_a_topic_are_over_clusters(tmp_path):
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.clusters import with_topics
    from fedrag_jax.retrieval.retriever import Retriever

    config = small()
    config.data.name = own_folder(tmp_path)
    found, dataset = partition_statistics.questions(config), loading.load_data(config)
    whole = with_topics(dataset, Retriever.build(hub.load("builtin:encoder"), dataset.passages[:2]))
    assert found == whole.train and all(e.topic.startswith("cluster") for e in found)
