"""Retrieval of passages that stay with their owners: the cost in recall and in bytes.

    python -m experiments federated_retrieval
    python -m experiments federated_retrieval \
        --config.name=squad --config.data.name=squad --config.retriever=minilm

The first command takes half a minute on 2 CPU cores. Merged by score, all silos together find the
passages of one index, for any alpha. Under a budget, recall depends on how much the silos differ and
how much they publish. With alpha 0.1, Recall@5 of two silos of eight is 60% if each publishes 128
centroids and 41% if it publishes 8; one index reaches 67%.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "federated_retrieval"
    config.retriever = "builtin:encoder"  # "minilm", a folder or hub id
    config.data = ConfigDict()
    config.data.name = "world"  # or a named set, or a folder in the same schema
    config.data.test_questions = 0  # size of a random sample; 0: all
    config.data.sample_seed = 0
    config.clients = 8  # number of silos
    config.alphas = (0.1, 1.0, float("inf"))  # of passages over topics, or over clusters
    config.seeds = (0, 1, 2)  # seeds of the split
    config.merge = ("score", "rrf")
    config.budgets = (0, 1, 2, 4)  # number of silos per question; 0: all
    config.centroids = 32  # published per silo
    config.passages = 10  # found and fetched per question
    return config
