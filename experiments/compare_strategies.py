"""Fine-tuning strategies for RAG, centralised, federated and local: one table with costs.

    python -m experiments.compare_strategies --config=configs/compare_strategies.py
    python -m experiments.compare_strategies --config=configs/compare_strategies.py \
        --config.name=more-clients --config.federated.clients=32

Results go to runs/<name>/. A cell (strategy, setting, seed) that is finished is not computed again,
and a training that was killed goes on from its last checkpoint.
"""

import collections
import dataclasses
import json
import pathlib
import time

import numpy as np

from experiments.inputs import check, load_data, load_generator, warn_of_borrowed_rates
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
        self.systems = {}
        if config.federated.column == "topic":
            self.dataset = with_topics(dataset, self.system(config.seeds[0]).retriever)

    def system(self, seed: int):
        """The untuned system; only the random half of its adapters depends on the seed."""
        from fedrag_jax.models.lora import LoraConfig
        from fedrag_jax.rag import RAGSystem

        if seed not in self.systems:
            c = self.config
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
        return self.systems[seed]

    def clients(self, seed: int):
        """The split that federated and local training share."""
        from fedrag_jax.strategies.settings import split_clients

        federated = self.config.federated
        return split_clients(
            self.dataset.train, federated.clients, federated.alpha, federated.column, seed
        )

    def rate(self, setting: str, task: str, part: str) -> float:
        """The learning rate chosen for a part of a task in a setting."""
        rates = self.config.learning_rates[setting]
        if task.startswith("rag_"):
            return rates.marginal_generator if part == "adapters" else rates.marginal_retriever
        return rates.generator if part == "adapters" else rates.retriever

    def tuner(self, setting: str, seed: int, client: int | None = None, rate=None):
        """The `tune` of one setting, seed and (local) client."""
        from fedrag_jax.strategies.settings import Budget
        from fedrag_jax.strategies.tuner import Tuner

        t = self.config.training
        folder = self.folder / "tuned" / f"{setting}-seed{seed}"
        return Tuner(
            folder=folder if client is None else folder / f"client{client}",
            setting=setting,
            examples=self.dataset.train,
            clients=self.clients(seed),
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

    def tuned_systems(self, strategy: str, setting: str, seed: int):
        """`(systems, tuners)`: one of each, or one per client in the local setting."""
        from fedrag_jax.strategies.strategies import STRATEGIES

        members = range(self.config.federated.clients) if setting == "local" else (None,)
        tuners = [self.tuner(setting, seed, client) for client in members]
        tune = STRATEGIES[strategy]
        return [tune(self.system(seed), self.dataset, tuner) for tuner in tuners], tuners


def compute_cell(run: Comparison, strategy: str, setting: str, seed: int):
    """Trains, evaluates on the test set, and prices one cell."""
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.ledger import Cost

    if strategy == "none":
        known = cells.load(run.folder, strategy, run.config.settings[0], seed)
        if known:  # untuned is untuned wherever the data sits
            return known._replace(setting=setting)
        systems, tuners = [run.system(seed)], []
    else:
        systems, tuners = run.tuned_systems(strategy, setting, seed)
    test = run.dataset.test
    found = [evaluate(system, test) for system in systems]
    scores = {metric: np.mean([f[metric] for f in found], axis=0) for metric in found[0]}
    controls = control_scores(systems[0], test) if len(systems) == 1 else {}
    if tuners and setting == "local":
        column = run.config.federated.column
        controls |= own_topic(run.clients(seed), test, [f["em"] for f in found], column)
    # Centralised training has a round for each S steps: as many as there are clients make a point.
    stretch = run.config.federated.clients if setting == "centralised" else 1
    curves = training_curves(tuners, stretch)
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), Cost())
    return cells.Cell(strategy, setting, seed, scores, controls, cost, curves)


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


def own_topic(clients, examples, em, column: str) -> dict[str, float]:
    """`own_topic_em`: EM in percent of each client's model on what it holds of `column`.

    Weighted as the client holds it; nothing if no test question is of any client's kind.
    """
    kinds = [getattr(e, column) for e in examples]
    asked, values = collections.Counter(kinds), []
    for client, scores in enumerate(em):
        held = collections.Counter(getattr(e, column) for e in clients.of(client))
        weight = np.array([held[kind] / asked[kind] for kind in kinds])
        if weight.sum():
            values.append(100 * float((weight * scores).sum() / weight.sum()))
    return {"own_topic_em": float(np.mean(values))} if values else {}


def no_op(run: Comparison, seed: int) -> float:
    """Largest change of any test score after joint training at learning rate zero; must be 0."""
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.strategies.strategies import joint_token

    setting = run.config.settings[-1]  # one whose program is compiled
    client = 0 if setting == "local" else None
    tuner = run.tuner(setting, seed, client, rate=lambda task, part: 0.0)
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
    from fedrag_jax.tracking import cells, figures, tables

    done = [
        cell
        for setting in config.settings
        for strategy in config.strategies
        for seed in config.seeds
        if (cell := cells.load(folder, strategy, setting, seed))
    ]
    rows = tables.strategy_rows(done, config.federated.alpha)
    comparisons, controls = tables.comparison_rows(done), tables.control_rows(done)
    tables.write_csv(folder / "strategies.csv", rows, tables.COLUMNS)
    if comparisons:
        tables.write_csv(folder / "comparisons.csv", comparisons, list(comparisons[0]))
    if controls:
        columns = list(dict.fromkeys(name for row in controls for name in row))
        tables.write_csv(folder / "controls.csv", controls, columns)
    figures.quality_against_cost(rows, folder / "quality_cost.png")
    figures.learning_curves(done, folder / "learning_curves.png")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for cell in done:
            where = {"strategy": cell.strategy, "setting": cell.setting, "seed": cell.seed}
            for task, rounds in cell.curves.items():
                for record in rounds:
                    file.write(json.dumps(where | {"task": task} | record) + "\n")
    text = [
        f"# {folder.name}\n",
        f"{config.data.name}, {config.federated.clients} clients, Dirichlet alpha "
        f"{config.federated.alpha} over {config.federated.column}; metrics in percent, EM with 95% "
        "bootstrap interval over test questions.\n",
        tables.strategies_markdown(rows),
        "\n## Paired comparisons\n\nDifference in points with 95% interval; p by permutation over "
        "questions, Holm-adjusted over this table; p_t over seeds from five seeds on.\n",
        tables.markdown(
            comparisons,
            (
                "strategy",
                "setting",
                "against",
                "metric",
                "difference",
                "low",
                "high",
                "p_holm",
                "p_t",
            ),
        ),
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
    check(config, dataset)
    warn_of_borrowed_rates(config)
    folder = pathlib.Path(runs) / config.name
    comparison = Comparison(config, dataset, folder)
    for seed in config.seeds:
        comparison.clients(seed)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=("seeds", "strategies", "settings", "wandb"))
    write_manifest(folder, dataset, seeds={name: list(config.seeds) for name in
                   ("adapters", "client split", "client sampling", "shuffling")})  # fmt: skip
    todo = [
        (strategy, setting, seed)
        for seed in config.seeds
        for setting in config.settings
        for strategy in config.strategies
    ]
    for i, (strategy, setting, seed) in enumerate(todo, 1):
        if everywhere(cells.load(folder, strategy, setting, seed) is not None):
            continue
        cell = compute_cell(comparison, strategy, setting, seed)
        cells.save(folder, cell)
        log_cell(
            cell, folder, config.name, config.wandb.mode, config.wandb.project, config.to_dict()
        )
        print(
            f"[{i}/{len(todo)}] {strategy}, {setting}, seed {seed}: EM "
            f"{100 * cell.scores['em'].mean():.1f}  Recall@5 "
            f"{100 * cell.scores['recall_at_5'].mean():.1f}  trained {cell.cost.seconds:.0f} s  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    report(config, folder, no_op(comparison, config.seeds[0]))
    return folder


if __name__ == "__main__":
    launch(run, "configs/compare_strategies.py")
