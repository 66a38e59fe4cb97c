"""Recall and bytes of retrieval from private corpora: merges and budgets against one index.

    python -m experiments federated_retrieval

Nothing is trained. Passages are split by topic, each silo indexes its own, and the test questions are
asked by somebody without passages. Writes runs/<name>/federated_retrieval.csv and table.md: metrics in
percent with 95% bootstrap intervals over questions and seeds of the split, and bytes of a question by
what they are.
"""

import pathlib
import time

import numpy as np

from experiments.launch import settled_config
from experiments.loading import require_some
from experiments.reporting.tables import Table, interval, number, words, write_csv
from fedrag_jax.data import datasets
from fedrag_jax.data.examples import Dataset, clusters, sample
from fedrag_jax.data.partition import partition
from fedrag_jax.data.schemes import dirichlet
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import rank_scores
from fedrag_jax.evaluation.significance import bootstrap_interval
from fedrag_jax.files import write_text
from fedrag_jax.models import hub
from fedrag_jax.retrieval.clusters import kmeans_labels
from fedrag_jax.retrieval.index.silos import SearchBudget, over_silos
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.tracking.manifest import write_manifest

METRICS = ("recall_at_1", "recall_at_5", "mrr")
BYTES = ("query_bytes", "answer_bytes", "passage_bytes", "total_bytes")


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: names the setting, its value and what it may be.
    """
    require_some(config, "alphas", "seeds", "merge", "budgets")
    if config.passages < 10:
        raise ConfigError(f"config.passages must be at least 10, for MRR@10, got {config.passages}")
    for silos in config.budgets:
        if not 0 <= silos <= config.clients:
            raise ConfigError(
                f"config.budgets: silos from 1 to config.clients={config.clients}, or 0 for all; "
                f"got {silos}"
            )


def measured(retriever, examples, questions, depth: int) -> dict[str, np.ndarray]:
    """Returns metrics and traffic of each question [Q], for `questions` float32 [Q, D]."""
    rows, _, traffic = retriever.index.ask(questions, depth)
    costs = {name: getattr(traffic, name) for name in ("silos", *BYTES)}
    return rank_scores(retriever, examples, rows, depths=(1, 5)) | costs


def summary(found: list[dict[str, np.ndarray]], about) -> dict[str, float]:
    """Returns means over seeds and questions; metrics in percent, with intervals.

    Args:
      about: the cluster of each question.
    """
    row = {}
    for name in found[0]:
        scores = np.stack([f[name] for f in found]) * (100 if name in METRICS else 1)
        row[name] = float(scores.mean())
        if name in METRICS:
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(scores, about)
    return row


def table(rows):
    """Returns the `Table` of the rows."""
    titles = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "mrr": "MRR@10"}
    costs = {"query_bytes": "queries", "answer_bytes": "answers", "passage_bytes": "passages"}
    columns = [
        *(words(name, name) for name in ("alpha", "merge", "budget")),
        *(interval(title, name) for name, title in titles.items()),
        number("silos asked", "silos"),
        *(number(f"bytes of {title}", name, 0) for name, title in costs.items()),
        number("bytes", "total_bytes", 0),
        number("bytes published, once", "published_bytes", 0),
    ]
    return Table(columns, rows)


def run(config, runs: str) -> pathlib.Path:
    """Measures all splits, merges and budgets; returns the folder of the results."""
    check(config)
    began = time.perf_counter()
    folder = pathlib.Path(runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=())
    loaded = datasets.of_config(config.data)
    labelled = [e for e in loaded.test if e.positive_ids]
    test = sample(labelled, config.data.test_questions, config.data.sample_seed)
    dataset = Dataset(loaded.name, loaded.passages, loaded.train, loaded.validation, test)
    write_manifest(folder, dataset, seeds=config.seeds)

    retriever = Retriever.build(hub.load(config.retriever), dataset.passages, progress=True)
    questions = retriever.embed_questions([e.question for e in test])
    topics = [p.topic for p in dataset.passages]
    together = clusters([e.positive_ids for e in test], dataset.passages)
    column = topics if any(topics) else kmeans_labels(retriever.vectors)

    def row(silos_of_seed, **settings):
        systems = [over_silos(retriever, silos, **settings) for silos in silos_of_seed]
        found = [measured(system, test, questions, config.passages) for system in systems]
        published = np.mean([system.index.published_bytes for system in systems])
        return summary(found, together) | {"published_bytes": float(published)}

    rows = [{"merge": "one index"} | row([[np.arange(len(topics))]])]
    for alpha in config.alphas:
        splits = [
            partition(dataset.passages, dirichlet(alpha, config.clients, column), seed).clients
            for seed in config.seeds
        ]
        for merge in config.merge:
            for most in config.budgets:
                about = {"alpha": f"{alpha:g}", "merge": merge, "budget": most or "all"}
                settings = {
                    "budget": SearchBudget(silos=most or None),
                    "centroids": config.centroids,
                }
                rows.append(about | row(splits, merge=merge, **settings))
    columns = list(dict.fromkeys(["alpha", "merge", "budget", *rows[0]]))
    write_csv(folder / "federated_retrieval.csv", rows, columns)
    text = (
        f"# {config.name}: {dataset.name}, {config.clients} silos\n\n{table(rows).markdown()}\n\n"
        f"Metrics in percent with 95% bootstrap intervals over {len(test)} questions, means over "
        f"{len(config.seeds)} splits. Budget: silos that a question goes to. Bytes of a question for "
        f"{config.passages} passages; its asker has none of them.\n"
    )
    write_text(folder / "table.md", text)
    print(f"{text}\n{time.perf_counter() - began:.0f} s; {folder}/federated_retrieval.csv")
    return folder
