"""Recall of a real retriever on SQuAD and HotpotQA, before and after query-side tuning.

    python -m experiments.tune_retrieval --config=configs/tune_retrieval.py

Writes runs/<name>/retrieval.csv and table.md. Corpora are embedded once and cached on disk; tuned
encoders are kept, so that a second call only evaluates.
"""

import csv
import json
import pathlib
import time

import numpy as np

from experiments.launch import launch, settled_config
from fedrag_jax.errors import ConfigError

COLUMNS = ("dataset", "setting", "method", "recall_at_1", "recall_at_5", "recall_at_20", "mrr",
           "learning_rate", "seconds")  # fmt: skip


class Kept:
    """The rows of retrieval.csv, those of earlier calls too."""

    def __init__(self, folder: pathlib.Path):
        self.path, self.found = folder / "retrieval.csv", {}
        if self.path.exists():
            with open(self.path, newline="") as file:
                for row in csv.DictReader(file):
                    numbers = {name: float(row[name]) for name in COLUMNS[3:] if row[name]}
                    self._put({name: row[name] for name in COLUMNS[:3]} | numbers)

    def _put(self, row) -> None:
        self.found[tuple(row[name] for name in COLUMNS[:3])] = row

    def add(self, row) -> None:
        """In place of the one about the same, if there is one."""
        from fedrag_jax.tracking.tables import write_csv

        self._put(row)
        write_csv(self.path, self.rows(), COLUMNS)

    def rows(self) -> list[dict]:
        """In the order of the table: by set, in each first what is untuned."""
        return [self.found[key] for key in sorted(self.found)]


def rank_scores(retriever, examples) -> dict[str, np.ndarray]:
    """Recall@1, 5, 20 and MRR@10 of each example [Q]."""
    from fedrag_jax.evaluation import evaluator

    depth = min(20, len(retriever.passages))
    ranked, _ = retriever.search([e.question for e in examples], depth)
    return evaluator.rank_scores(retriever, examples, ranked, depths=(1, 5, 20))


def method_of(config, name: str) -> tuple[int, dict]:
    """`(batch size, options of multiple_negatives_ranking)` of a way to train.

    Raises:
      ConfigError: there is none of that name.
    """
    from fedrag_jax.retrieval.mining import Mining

    size = config.batch_size
    methods = {
        "in_batch": (size, {}),
        "mined": (size, {"mining": Mining(config.mined)}),
        "large_batch": (size * config.large_batch, {"at_once": size}),
    }
    if name not in methods:
        raise ConfigError(f"config.methods: {name!r} unknown; choose among {[*methods]}")
    return methods[name]


def tuned(config, dataset, retriever, setting: str, method: str, rates, folder: pathlib.Path):
    """`(encoders, learning rate, seconds)`: one query encoder, in the local setting one a client."""
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking
    from fedrag_jax.strategies.settings import Budget, split_clients
    from fedrag_jax.strategies.tuner import Tuner

    clients = split_clients(
        dataset.train, config.clients, config.alpha, "topic", config.seed, config.min_examples
    )
    validation = dataset.validation[:500]
    members = range(config.clients) if setting == "local" else (None,)
    best, (batch_size, options) = None, method_of(config, method)
    for rate in rates:
        encoders, seconds = [], 0.0
        for client in members:
            where = folder / dataset.name / setting / method / f"lr{rate:g}"
            tuner = Tuner(
                folder=where if client is None else where / f"client{client}",
                setting=setting,
                examples=dataset.train,
                clients=clients,
                budget=Budget(config.rounds, config.local_steps, config.clients, batch_size),
                rates=lambda task, part, rate=rate: rate,
                seed=config.seed,
                client=client,
                checkpoint_every=config.rounds,
            )
            task = multiple_negatives_ranking(
                retriever, dataset, max_question_tokens=config.max_question_tokens, **options
            )
            encoders.append(tuner(task)["query"])
            seconds += tuner.costs[task.name].seconds
        found = [rank_scores(retriever.with_query(q), validation)["mrr"].mean() for q in encoders]
        mrr = 100 * np.mean(found)
        print(f"{dataset.name}, {setting}, {method}, lr {rate:g}: validation MRR {mrr:.2f}")
        if best is None or np.mean(found) > best[0]:
            best = np.mean(found), encoders, rate, seconds
    return best[1:]


def run(config, runs: str) -> pathlib.Path:
    """Both datasets in all settings; returns the folder of the results."""
    from fedrag_jax.data import datasets
    from fedrag_jax.data.examples import Dataset
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.clusters import with_topics
    from fedrag_jax.retrieval.retriever import Retriever
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.tables import Table, number, words

    folder = pathlib.Path(runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    for method in config.methods:
        method_of(config, method)  # refuses what there is not
    settled_config(config, folder, free=("learning_rates", "settings", "datasets", "methods"))
    began = time.perf_counter()
    model = hub.load(config.retriever)
    kept = Kept(folder)
    for name in config.datasets:
        loaded = datasets.load(name)
        dataset = Dataset(
            loaded.name,
            loaded.passages,
            [e for e in loaded.train if e.positive_ids][: config.train_questions or None],
            [e for e in loaded.validation if e.positive_ids],
            [e for e in loaded.test if e.positive_ids][: config.test_questions or None],
        )
        write_manifest(folder, dataset, seeds=config.seed)
        (folder / "manifest.json").rename(folder / f"manifest-{dataset.name}.json")
        retriever = Retriever.build(model, dataset.passages, progress=True)
        dataset = with_topics(dataset, retriever)
        before = {k: 100 * v.mean() for k, v in rank_scores(retriever, dataset.test).items()}
        print(f"{dataset.name}, untuned: {json.dumps({k: round(v, 2) for k, v in before.items()})}")
        kept.add({"dataset": dataset.name, "setting": "", "method": "untuned"} | before)
        for setting in config.settings:
            rates = config.learning_rates[setting]
            for method in config.methods:
                if setting == "local" and method == "large_batch":
                    print(
                        "large_batch is left out of local training: clients hold too few questions"
                    )
                    continue
                encoders, rate, seconds = tuned(
                    config, dataset, retriever, setting, method, rates, folder
                )
                rates = (rate,)  # the others take the one that suits the first
                found = [rank_scores(retriever.with_query(q), dataset.test) for q in encoders]
                after = {k: 100 * float(np.mean([f[k] for f in found])) for k in found[0]}
                about = {"dataset": dataset.name, "setting": setting, "method": method}
                kept.add(about | {"learning_rate": rate, "seconds": seconds} | after)
                print(f"{dataset.name}, {setting}, {method}: Recall@5 {after['recall_at_5']:.1f} "
                      f"({time.perf_counter() - began:.0f} s so far)", flush=True)  # fmt: skip
    columns = [*(words(name, name) for name in COLUMNS[:3]), *(number(n, n) for n in COLUMNS[3:7])]
    text = Table(columns, kept.rows()).markdown()
    (folder / "table.md").write_text(text + "\n")
    print(f"{text}\n\n{(time.perf_counter() - began) / 60:.1f} minutes; {folder}/retrieval.csv")
    return folder


if __name__ == "__main__":
    launch(run, "configs/tune_retrieval.py")
