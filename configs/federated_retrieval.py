"""Passages that stay with their owners: what finding them costs in recall and in bytes.

    python -m experiments federated_retrieval
    python -m experiments federated_retrieval \
        --config.name=squad --config.data.name=squad --config.retriever=minilm

The first takes half a minute on 2 CPU cores. Merged by score, silos that are all asked find what one
index finds, for any alpha. Under a budget, recall depends on how unlike the silos are and how much they
publish: with alpha 0.1, two silos of eight find 60% at 5 where each publishes 128 centroids, 41% where
it publishes 8, and one index finds 67%.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "federated_retrieval"
    config.retriever = "builtin:encoder"  # "minilm", a folder or hub id
    config.data = ConfigDict()
    config.data.name = "world"  # or a named set, or a folder in the same schema
    config.data.test_questions = 0  # of a random sample; 0: all
    config.data.sample_seed = 0
    config.clients = 8  # silos
    config.alphas = (0.1, 1.0, float("inf"))  # of passages over topics, or clusters without them
    config.seeds = (0, 1, 2)  # of the split
    config.merge = ("score", "rrf")
    config.budgets = (0, 1, 2, 4)  # silos that a question goes to; 0: all
    config.centroids = 32  # that a silo publishes
    config.passages = 10  # found, and fetched, for a question
    return config
