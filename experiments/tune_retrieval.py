"""Recall of a real retriever on SQuAD and HotpotQA, before and after query-side tuning.

    python -m experiments.tune_retrieval --config=configs/tune_retrieval.py

Writes runs/<name>/retrieval.csv and table.md. Corpora are embedded once and cached on disk; tuned
encoders are kept, so that a second call only evaluates.
"""

import json
import pathlib
import time

import numpy as np

from experiments.launch import launch, settled_config

COLUMNS = ("dataset", "setting", "stage", "recall_at_1", "recall_at_5", "recall_at_20", "mrr",
           "learning_rate", "seconds")  # fmt: skip


def rank_scores(retriever, examples) -> dict[str, np.ndarray]:
    """Recall@1, 5, 20 and MRR@10 of each example [Q]."""
    from fedrag_jax.evaluation import evaluator

    depth = min(20, len(retriever.passages))
    ranked, _ = retriever.search([e.question for e in examples], depth)
    return evaluator.rank_scores(retriever, examples, ranked, depths=(1, 5, 20))


def tuned(config, dataset, retriever, setting: str, folder: pathlib.Path):
    """`(encoders, learning rate, seconds)`: one query encoder, in the local setting one a client."""
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking
    from fedrag_jax.strategies.settings import Budget, split_clients
    from fedrag_jax.strategies.tuner import Tuner

    clients = split_clients(
        dataset.train, config.clients, config.alpha, "topic", config.seed, config.min_examples
    )
    validation = dataset.validation[:500]
    members = range(config.clients) if setting == "local" else (None,)
    best = None
    for rate in config.learning_rates[setting]:
        encoders, seconds = [], 0.0
        for client in members:
            where = folder / dataset.name / setting / f"lr{rate:g}"
            tuner = Tuner(
                folder=where if client is None else where / f"client{client}",
                setting=setting,
                examples=dataset.train,
                clients=clients,
                budget=Budget(config.rounds, config.local_steps, config.clients, config.batch_size),
                rates=lambda task, part, rate=rate: rate,
                seed=config.seed,
                client=client,
                checkpoint_every=config.rounds,
            )
            task = multiple_negatives_ranking(
                retriever, dataset, max_question_tokens=config.max_question_tokens
            )
            encoders.append(tuner(task)["query"])
            seconds += tuner.costs[task.name].seconds
        found = [rank_scores(retriever.with_query(q), validation)["mrr"].mean() for q in encoders]
        print(f"{dataset.name}, {setting}, lr {rate:g}: validation MRR {100 * np.mean(found):.2f}")
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
    from fedrag_jax.tracking.tables import Table, number, words, write_csv

    folder = pathlib.Path(runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("learning_rates", "settings", "datasets"))
    began = time.perf_counter()
    model = hub.load(config.retriever)
    rows = []
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
        for setting in config.settings:
            where = {"dataset": dataset.name, "setting": setting}
            rows.append(where | {"stage": "before"} | before)
            encoders, rate, seconds = tuned(config, dataset, retriever, setting, folder)
            found = [rank_scores(retriever.with_query(query), dataset.test) for query in encoders]
            after = {k: 100 * float(np.mean([f[k] for f in found])) for k in found[0]}
            about = {"stage": "after", "learning_rate": rate, "seconds": seconds}
            rows.append(where | about | after)
            write_csv(folder / "retrieval.csv", rows, COLUMNS)
            print(f"{dataset.name}, {setting}: Recall@5 {after['recall_at_5']:.1f} "
                  f"({time.perf_counter() - began:.0f} s so far)", flush=True)  # fmt: skip
    columns = [*(words(name, name) for name in COLUMNS[:3]), *(number(n, n) for n in COLUMNS[3:7])]
    text = Table(columns, rows).markdown()
    (folder / "table.md").write_text(text + "\n")
    print(f"{text}\n\n{(time.perf_counter() - began) / 60:.1f} minutes; {folder}/retrieval.csv")
    return folder


if __name__ == "__main__":
    launch(run, "configs/tune_retrieval.py")
