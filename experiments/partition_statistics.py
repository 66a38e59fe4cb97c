"""Differences between the clients of a comparison: statistics and a figure, without training.

    python -m experiments partition_statistics
    python -m experiments partition_statistics \
        --config.name=mild --config.federated.clients=60 --config.federated.alpha=1.0

Writes runs/<name>-partition/: partition.md and partition.csv with a row for each seed of the config
and one of an IID split beside it, and partition.png of the first seed.
"""

import pathlib

from experiments.launch import settled_config
from experiments.loading import load_data, load_retriever, require_some
from experiments.reporting.partition_figures import label_distribution
from experiments.reporting.tables import Table, number, words, write_csv
from fedrag_jax.files import write_text
from fedrag_jax.strategies.regimes import parse, split_clients


def questions(config):
    """The training questions that the comparison splits; those without a topic have a cluster."""
    dataset = load_data(config)
    if config.federated.column == "topic" and not all(e.topic for e in dataset.train):
        from fedrag_jax.retrieval.clusters import with_topics
        from fedrag_jax.retrieval.retriever import Retriever

        # Clusters are those of questions: of the corpus one passage is enough.
        model = load_retriever(config.models)
        dataset = with_topics(dataset, Retriever.build(model, dataset.passages[:1]))
    return dataset.train


def partitions_table(rows):
    """Partitions, one a row: its name under `partition` beside `Partition.statistics`."""
    whole = {"clients": "clients", "examples": "examples", "least": "smallest"}
    columns = [
        words("partition", "partition"),
        *(number(title, key, 0) for title, key in whole.items()),
        number("median", "median"),
        number("most", "largest", 0),
        number("Gini of sizes", "size_gini", 2),
        number("classes", "classes", 0),
        number("effective classes of a client", "effective_classes"),
        number("total variation", "total_variation", 2),
    ]
    return Table(columns, rows)


def run(config, runs: str) -> pathlib.Path:
    """Splits as the comparison does; returns the folder of the results."""
    require_some(config, "seeds")
    clients, usual, column = (config.federated[name] for name in ("clients", "alpha", "column"))
    seeds = config.split_seeds or config.seeds
    apart = [parse(name, usual)[1] for name in config.regimes if name != "centralised"]
    alphas = list(dict.fromkeys(apart or [usual]))
    examples = questions(config)
    splits = {
        f"alpha {alpha:g}, seed {seed}": split_clients(examples, clients, alpha, column, seed)
        for alpha in alphas
        for seed in dict.fromkeys(seeds)
    }
    first = next(iter(splits.values()))
    splits["IID"] = split_clients(examples, clients, float("inf"), column, seeds[0])
    rows = [{"partition": name} | split.statistics(column) for name, split in splits.items()]

    folder = pathlib.Path(runs) / f"{config.name}-partition"
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("seeds", "split_seeds", "strategies", "regimes", "wandb"))
    text = (
        f"# {config.name}: {config.data.name}, {clients} clients, Dirichlet over "
        f"{column}\n\n{partitions_table(rows).markdown()}\n\n"
        "Gini of sizes: 0 where all clients hold as many. Effective classes: exp(entropy), mean over "
        "clients. Total variation: distance of a client's classes from those of all, in [0, 1], mean "
        "over clients.\n"
    )
    write_text(folder / "partition.md", text)
    write_csv(folder / "partition.csv", rows)
    label_distribution(first, folder / "partition.png", column)
    print(f"{text}\n{folder}/: partition.md partition.csv partition.png config.json")
    return folder
