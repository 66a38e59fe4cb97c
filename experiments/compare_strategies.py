"""Fine-tuning strategies for RAG, centralised, federated and local: one table with costs.

    python -m experiments.compare_strategies --config=configs/compare_strategies.py
    python -m experiments.compare_strategies --config=configs/compare_strategies.py \
        --config.name=more-clients --config.federated.clients=32

Results go to runs/<name>/. A cell (strategy, setting, seeds) that is finished is not computed again,
and a training that was killed goes on from its last checkpoint.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import time

import numpy as np

from experiments.inputs import (
    check,
    load_data,
    load_generator,
    replicates,
    trainable_strategies,
    warn_of_borrowed_rates,
)
from experiments.launch import launch, settled_config
from fedrag_jax.data.examples import Dataset

CONTROL_QUESTIONS = 200


class Comparison:
    """What all cells share: data, base system, client split, folders."""

    def __init__(self, config, dataset: Dataset, folder: pathlib.Path):
        from fedrag_jax.models import hub
        from fedrag_jax.retrieval.clusters import with_topics

        self.config, self.dataset, self.folder = config, dataset, folder
        self.models = {
            "generator": load_generator(config.models),
            "retriever": hub.load(config.models.retriever),
        }
        self.systems, self.embed_seconds = {}, 0.0
        if config.federated.column == "topic":
            self.dataset = with_topics(dataset, self.system(config.seeds[0]).retriever)

    def system(self, seed: int):
        """The untuned system; only the random half of its adapters depends on the seed."""
        from fedrag_jax.clock import Clock
        from fedrag_jax.models.lora import LoraConfig
        from fedrag_jax.rag import RAGSystem

        if seed not in self.systems:
            c, clock = self.config, Clock()
            lora = LoraConfig(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
            self.systems[seed] = RAGSystem.build(
                self.dataset.passages,
                self.dataset.train,
                **self.models,
                adapters=lora,
                prompt_style=c.models.prompt_style,
                **c.retrieval,
                max_passage_tokens=c.models.max_passage_tokens,
                seed=seed,
                progress=True,
            )
            self.embed_seconds = clock.lap().embedding
        return self.systems[seed]

    def corpus_cost(self, clients: int):
        """Of embedding the passages, and of having them and their vectors at so many clients."""
        from fedrag_jax.tracking.ledger import corpus_cost

        retriever = self.system(self.config.seeds[0]).retriever
        cost = corpus_cost(retriever.passages, retriever.vectors, clients)
        return cost._replace(embed_seconds=self.embed_seconds)

    def clients(self, setting: str, split: int):
        """Who holds what; federated and local training share it."""
        from fedrag_jax.strategies.settings import parse, split_clients

        federated = self.config.federated
        _, alpha = parse(setting, federated.alpha)
        return split_clients(self.dataset.train, federated.clients, alpha, federated.column, split)

    def rate(self, setting: str, task: str, part: str) -> float:
        """The learning rate chosen for a part of a task in a setting, or for its kind."""
        known = self.config.learning_rates
        rates = known[setting if setting in known else setting.partition("_")[0]]
        if task.startswith("rag_"):
            return rates.marginal_generator if part == "adapters" else rates.marginal_retriever
        return rates.generator if part == "adapters" else rates.retriever

    def tuner(self, setting: str, seed: int, split: int, client: int | None = None, rate=None):
        """The `tune` of one setting, pair of seeds and (local) client."""
        from fedrag_jax.strategies.settings import Budget, parse
        from fedrag_jax.strategies.tuner import Tuner
        from fedrag_jax.tracking.cells import seeds_name

        t = self.config.training
        folder = self.folder / "tuned" / f"{setting}-{seeds_name(seed, split)}"
        return Tuner(
            folder=folder if client is None else folder / f"client{client}",
            setting=parse(setting, self.config.federated.alpha)[0],
            examples=self.dataset.train,
            clients=self.clients(setting, split),
            budget=Budget(
                t.rounds,
                t.local_steps,
                self.config.federated.clients,
                t.batch_size,
                t.group_size or None,
                self.config.federated.devices,
            ),
            rates=rate or (lambda task, part: self.rate(setting, task, part)),
            seed=seed,
            client=client,
            checkpoint_every=t.checkpoint_every,
        )

    def tuned_systems(self, strategy: str, setting: str, seed: int, split: int):
        """`(systems, tuners)`: one of each, or one per client in the local setting."""
        from fedrag_jax.strategies.strategies import STRATEGIES, together
        from fedrag_jax.strategies.tuner import tune_together

        local = setting.startswith("local")
        members = range(self.config.federated.clients) if local else (None,)
        tuners = [self.tuner(setting, seed, split, client) for client in members]
        systems = together(
            STRATEGIES[strategy],
            [self.system(seed)] * len(tuners),
            self.dataset,
            lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
        )
        for failed in systems:
            if isinstance(failed, Exception):
                raise failed
        return systems, tuners


def compute_cell(run: Comparison, strategy: str, setting: str, seed: int, split: int):
    """Trains, evaluates on the test set, and prices one cell."""
    from fedrag_jax.clock import Clock
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.ledger import Cost

    test, known = run.dataset.test, None
    clients = run.clients(setting, split)
    if strategy == "none":  # untuned is untuned wherever the data sits
        known = cells.load(run.folder, strategy, run.config.settings[0], seed, split)
        systems, tuners = [run.system(seed)], []
    else:
        systems, tuners = run.tuned_systems(strategy, setting, seed, split)
    holders = 0 if setting == "centralised" else len(clients.clients)
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), run.corpus_cost(holders))
    if known:
        scores, controls = known.scores, known.controls
        em = [scores["em"]]
        cost += Cost(evaluate_seconds=known.cost.evaluate_seconds)
    else:
        clock = Clock()
        found = [evaluate(system, test) for system in systems]
        lap = clock.lap()
        cost += Cost(evaluate_seconds=lap.others + lap.searching, compile_seconds=lap.compiling)
        scores = {metric: np.mean([f[metric] for f in found], axis=0) for metric in found[0]}
        controls = control_scores(systems[0], test) if len(systems) == 1 else {}
        em = [f["em"] for f in found]
    # Centralised training has a round for each S steps: as many as there are clients make a point.
    stretch = run.config.federated.clients if setting == "centralised" else 1
    curves = training_curves(tuners, stretch)
    by_client = client_scores(clients, test, em, run.config.federated.column)
    return cells.Cell(strategy, setting, seed, split, scores, controls, by_client, cost, curves)


def training_curves(tuners, stretch: int) -> dict:
    """Points of each task: a mean over clients and over `stretch` rounds; examples, seconds add up."""
    curves = {}
    for task in tuners[0].costs if tuners else ():
        files = [t.folder / task / "rounds.jsonl" for t in tuners]
        runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        curves[task] = []
        for start in range(0, len(runs[0]), stretch):
            stretches = [records[start : start + stretch] for records in runs]
            some = [record for records in stretches for record in records]
            curves[task].append(
                {
                    "round": start // stretch + 1,
                    "loss": float(np.mean([r["loss"] for r in some])),
                    "metrics": {
                        name: float(np.mean([r["metrics"][name] for r in some]))
                        for name in some[0]["metrics"]
                    },
                    "examples": sum(records[-1]["examples"] for records in stretches),
                    "seconds": sum(r["seconds"] for r in some),
                }
            )
    return curves


def control_scores(system, examples) -> dict[str, float]:
    """EM in percent where it must stay low (no passage, a wrong one) or high (the gold one)."""
    from fedrag_jax.evaluation import evaluator
    from fedrag_jax.evaluation.metrics import percent

    some = examples[:CONTROL_QUESTIONS]
    controls = {
        "closed_book_em": percent(evaluator.closed_book(system, some)["em"]),
        "distractor_em": percent(evaluator.distractor_passage(system, some)["em"]),
    }
    labelled = [e for e in some if e.positive_ids]
    for name, hard in (("gold_em", False), ("gold_em_two_hop", True)):
        if asked := [e for e in labelled if (e.hops > 1) == hard]:
            controls[name] = percent(evaluator.gold_passage(system, asked)["em"])
    return controls


def client_scores(clients, examples, scores, column: str) -> list[float]:
    """For each client the score of its model, in percent, on questions such as it holds.

    A test question counts in proportion to how much of its kind (the value of `column`) the client
    holds. Clients of whose kinds no test question is are left out.

    Args:
      scores: [Q] of the model that all clients use, or of the model of each: a list of one or all.
    """
    kinds = [getattr(e, column) for e in examples]
    asked, values = collections.Counter(kinds), []
    for client in range(len(clients.clients)):
        held = collections.Counter(getattr(e, column) for e in clients.of(client))
        weight = np.array([held[kind] / asked[kind] for kind in kinds])
        own = scores[client % len(scores)]
        if weight.sum():
            values.append(100 * float((weight * own).sum() / weight.sum()))
    return values


def no_op(run: Comparison, seed: int, split: int) -> float:
    """Largest change of any test score after joint training at learning rate zero; must be 0."""
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.strategies.strategies import joint_token

    setting = run.config.settings[-1]  # one whose program is compiled
    client = 0 if setting.startswith("local") else None
    tuner = run.tuner(setting, seed, split, client, rate=lambda task, part: 0.0)
    tuner = dataclasses.replace(
        tuner,
        folder=run.folder / "tuned" / f"no-op-seed{seed}",
        budget=tuner.budget._replace(rounds=1),
    )
    some = run.dataset.test[:CONTROL_QUESTIONS]
    before = evaluate(run.system(seed), some)
    after = evaluate(joint_token(run.system(seed), run.dataset, tuner), some)
    return 100 * max(float(np.nan_to_num(np.abs(after[m] - before[m])).max()) for m in before)


def report(config, folder: pathlib.Path, change_of_no_op: float) -> None:
    """Tables and figures of all finished cells."""
    from fedrag_jax.strategies.settings import parse
    from fedrag_jax.tracking import cells, figures, tables

    done = [
        cell
        for setting in config.settings
        for strategy in config.strategies
        for seed, split in replicates(config)
        if (cell := cells.load(folder, strategy, setting, seed, split))
    ]
    alphas = {
        setting: parse(setting, config.federated.alpha)[1]
        for setting in config.settings
        if setting != "centralised"
    }
    rows = tables.strategy_rows(done, alphas)
    primary = config.primary_metric
    compared = {
        metric: tables.comparison_rows(done, metric, alphas)
        for metric in (primary, *(m for m in tables.METRICS if m != primary))
    }
    comparisons = [row for found in compared.values() for row in found]
    controls = tables.control_rows(done)
    tables.write_csv(folder / "strategies.csv", rows, tables.COLUMNS)
    if comparisons:
        tables.write_csv(folder / "comparisons.csv", comparisons, list(comparisons[0]))
    if traffic := tables.traffic_rows(done):
        tables.write_csv(folder / "traffic.csv", traffic, list(traffic[0]))
    if controls:
        columns = list(dict.fromkeys(name for row in controls for name in row))
        tables.write_csv(folder / "controls.csv", controls, columns)
    figures.quality_against_cost(rows, folder / "quality_cost.png")
    figures.learning_curves(done, folder / "learning_curves.png")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for cell in done:
            where = {"strategy": cell.strategy, "setting": cell.setting}
            where |= {"seed": cell.seed, "split": cell.split}
            for task, rounds in cell.curves.items():
                for record in rounds:
                    file.write(json.dumps(where | {"task": task} | record) + "\n")
    different = ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas.values())))
    split = f", Dirichlet alpha {different} over {config.federated.column}" if alphas else ""
    shown = ("strategy", "setting", "against", "difference", "low", "high", "effect", "better",
             "worse", "p_holm", "p_t_holm")  # fmt: skip
    text = [
        f"# {folder.name}\n",
        f"{config.data.name}, {config.federated.clients} clients{split}; metrics in percent, EM with "
        "95% bootstrap interval over test questions; seconds are elapsed, over all cores or devices.\n",
        tables.strategies_markdown(rows),
        "\n## Without gold passages\n\nWhere training questions name no gold passage, strategies that "
        "need none are as above, for they do not read it.\n",
        tables.without_labels_markdown(rows),
        f"\n## Paired comparisons of {primary}, the primary metric\n\nDifference in points with 95% "
        "interval; Cohen's d_z; percent of questions that are better and worse; p by permutation over "
        "questions, which is what claims rest on, and from five seeds p_t over seeds, each "
        "Holm-adjusted over this table. Other metrics, each adjusted by itself, are in "
        "comparisons.csv.\n",
        tables.markdown(compared[primary], shown),
        "\n## Costs\n\nSeconds by part, the mean over seeds, summed over clients in the local setting; "
        "operations of training steps, by formula and by the compiler; memory of the largest round "
        "on a device; bytes of what is trained (by part and type in traffic.csv), and of the corpus "
        "and its index on their way to the clients.\n",
        tables.costs_markdown(rows),
        "\n## Clients\n\nEM of the model each client would use, on questions such as it holds.\n",
        tables.clients_markdown(rows),
        "\n## Controls\n\nEM in percent without passages, with a distractor alone, with the gold "
        f"passages alone. Training at learning rate zero changed scores by {change_of_no_op:.1f}.\n",
        tables.markdown(controls, list(controls[0])) if controls else "",
    ]
    (folder / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    print(f"\n{folder}/: table.md strategies.csv comparisons.csv controls.csv quality_cost.png "
          "learning_curves.png metrics.jsonl config.json manifest.json")  # fmt: skip


def run(config, runs: str) -> pathlib.Path:
    """The whole comparison; returns its folder."""
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.processes import everywhere
    from fedrag_jax.tracking.weights_and_biases import log_cell

    began = time.perf_counter()
    dataset = load_data(config)
    check(config)
    warn_of_borrowed_rates(config)
    folder = pathlib.Path(runs) / config.name
    comparison = Comparison(config, dataset, folder)
    for setting, (_, split) in itertools.product(config.settings, replicates(config)):
        comparison.clients(setting, split)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("seeds", "split_seeds", "strategies", "settings", "wandb"))
    seeds = {"model": list(config.seeds), "client split": [p for _, p in replicates(config)]}
    write_manifest(folder, dataset, seeds=seeds)
    strategies = trainable_strategies(config, dataset)
    todo = [
        (strategy, setting, seed, split)
        for seed, split in replicates(config)
        for setting in config.settings
        for strategy in strategies
    ]
    for i, (strategy, setting, seed, split) in enumerate(todo, 1):
        if everywhere(cells.load(folder, strategy, setting, seed, split) is not None):
            continue
        cell = compute_cell(comparison, strategy, setting, seed, split)
        cells.save(folder, cell)
        log_cell(
            cell, folder, config.name, config.wandb.mode, config.wandb.project, config.to_dict()
        )
        print(
            f"[{i}/{len(todo)}] {strategy}, {setting}, {cells.seeds_name(seed, split)}: EM "
            f"{100 * cell.scores['em'].mean():.1f}  Recall@5 "
            f"{100 * cell.scores['recall_at_5'].mean():.1f}  trained {cell.cost.seconds:.0f} s  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    report(config, folder, no_op(comparison, *replicates(config)[0]))
    return folder


if __name__ == "__main__":
    launch(run, "configs/compare_strategies.py")
