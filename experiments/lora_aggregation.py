"""Rules for averaging adapters: what each makes of the same clients, and what it sends.

    python -m experiments.lora_aggregation --config=configs/lora_aggregation.py

Results go to runs/<name>/: lora_aggregation.csv, table.md, report.html, figures. A cell (rule, rank,
alpha, seeds) that is finished is not computed again.
"""

import dataclasses
import itertools
import json
import pathlib
import time
import zlib
from typing import NamedTuple

import numpy as np

from experiments.inputs import load_data, load_generator, replicates
from experiments.launch import launch, settled_config
from fedrag_jax.errors import ConfigError, DataError, DivergenceError


class Reading(NamedTuple):
    """A system of one rank, and what its generator reads for each question.

    Attributes:
      rows: {id of an example: corpus rows}, its gold passages among them.
    """

    system: object
    rows: dict[str, np.ndarray]

    def of(self, examples) -> np.ndarray:
        """Corpus rows [N, k]."""
        return np.stack([self.rows[e.id] for e in examples])


def with_gold(retriever, examples, k: int) -> dict[str, np.ndarray]:
    """For each example its gold passages and the nearest others, k in all, in an order by chance."""
    from fedrag_jax.data.seeds import stream

    found, _ = retriever.search([e.question for e in examples], k)
    row = {passage.id: i for i, passage in enumerate(retriever.passages)}
    read = {}
    for example, nearest in zip(examples, found, strict=True):
        gold = [row[i] for i in example.positive_ids][:k]
        others = [r for r in nearest if r not in gold]
        chosen = np.array([*gold, *others[: k - len(gold)]])
        order = stream(0, "reading order", zlib.crc32(example.id.encode())).permutation(k)
        read[example.id] = chosen[order]
    return read


def scores(systems, reading: Reading, examples) -> dict[str, np.ndarray]:
    """`em`, `f1` and `nll` of the answer [Q], the mean over systems."""
    from fedrag_jax.evaluation import evaluator

    rows = reading.of(examples)
    found = [
        evaluator.answers(system, examples, rows)
        | {"nll": evaluator.answer_nll(system, examples, rows)}
        for system in systems
    ]
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}


class Aggregation:
    """What all cells share: data, systems, client splits, folder."""

    def __init__(self, config, dataset, folder: pathlib.Path):
        from fedrag_jax.models import hub

        self.config, self.dataset, self.folder, self.readings = config, dataset, folder, {}
        self.models = {
            "generator": load_generator(config.models),
            "retriever": hub.load(config.models.retriever),
        }
        self.validation = dataset.validation[: config.validation_questions]

    def reading(self, rank: int, seed: int) -> Reading:
        """The untuned system of a rank."""
        from fedrag_jax.models.lora import LoraConfig
        from fedrag_jax.rag import RAGSystem

        c, data = self.config, self.dataset
        if (rank, seed) not in self.readings:
            everybody = [*data.train, *self.validation, *data.test]
            system = RAGSystem.build(
                data.passages,
                everybody,
                **self.models,
                adapters=LoraConfig(rank, c.lora.scale * rank, tuple(c.lora.targets)),
                prompt_style=c.models.prompt_style,
                top_k=c.retrieval.top_k,
                max_passage_tokens=c.models.max_passage_tokens,
                seed=seed,
            )
            known = next(iter(self.readings.values()), None)
            rows = known.rows if known else with_gold(system.retriever, everybody, system.top_k)
            self.readings[rank, seed] = Reading(system, rows)
        return self.readings[rank, seed]

    def clients(self, alpha: float, split: int):
        """Who holds what."""
        from fedrag_jax.strategies.settings import split_clients

        f = self.config.federated
        return split_clients(self.dataset.train, f.clients, alpha, f.column, split)

    def tuned(self, rule: str, rank: int, alpha: float, seed: int, split: int, rate: float):
        """`(systems, cost)`: one system, or one for each client where adapters are personal.

        Raises:
          DivergenceError: training at this rate ends in numbers that are not finite.
        """
        import jax

        from fedrag_jax.federated.fed_lora import fed_lora
        from fedrag_jax.federated.fit import fit
        from fedrag_jax.objectives.generator import concatenated
        from fedrag_jax.strategies import settings
        from fedrag_jax.tracking.ledger import training_cost
        from fedrag_jax.tracking.logs import Progress

        t, f = self.config.training, self.config.federated
        reading = self.reading(rank, seed)
        system = reading.system
        task = concatenated(
            system.decoder, system.generator.params, system.adapters, system.prompts, reading.of
        )
        budget = settings.Budget(
            t.rounds, t.local_steps, f.clients, t.batch_size, t.group_size or None, f.devices
        )
        arguments = settings.arguments(
            task,
            "federated",
            self.dataset.train,
            self.clients(alpha, split),
            budget,
            {"adapters": rate},
            seed,
            callbacks=[Progress(f"{rule}, rank {rank}, alpha {alpha:g}, rate {rate:g}")],
        )
        algorithm = fed_lora(rule, system.decoder, local_steps=t.local_steps)
        result = fit(**arguments | {"algorithm": algorithm})
        table = task.collate(self.dataset.train[:1], None)
        steps = t.rounds * t.local_steps * f.clients
        cost = training_cost(task, result.history, table, steps=steps, batch_size=t.batch_size)
        generator = dataclasses.replace(system.generator, params=result.frozen["decoder"])
        several = [result.trainable]
        if algorithm.model is not None:  # stacked
            several = [
                jax.tree.map(lambda x, i=i: x[i], result.trainable) for i in range(f.clients)
            ]
        system = dataclasses.replace(system, generator=generator)
        return [system.replace(**trainable) for trainable in several], cost

    def cell(self, rule: str, rank: int, alpha: float, seed: int, split: int):
        """A cell at the best learning rate, which is searched with the first seed."""
        from fedrag_jax.evaluation import evaluator
        from fedrag_jax.tracking import cells

        setting, reading = setting_name(rank, alpha), self.reading(rank, seed)
        path, best = self.folder / "rates" / f"{rule}-{setting}.json", None
        if (seed, split) == replicates(self.config)[0] or not path.exists():
            found = {}
            for rate in self.config.learning_rates:
                try:
                    systems, cost = self.tuned(rule, rank, alpha, *replicates(self.config)[0], rate)
                except DivergenceError as error:
                    print(f"{rule}, {setting}, rate {rate:g}: {error}")
                    continue
                rows = reading.of(self.validation)
                nll = [evaluator.answer_nll(system, self.validation, rows) for system in systems]
                found[rate] = float(np.mean(nll))
                if found[rate] == min(found.values()):
                    best = systems, cost
            if not found:
                raise ConfigError(
                    f"{rule}, {setting}: training diverged at all of config.learning_rates "
                    f"{self.config.learning_rates}; add smaller ones"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            chosen = min(found, key=found.__getitem__)
            path.write_text(json.dumps({"rate": chosen, "validation nll": found}) + "\n")
        if (seed, split) != replicates(self.config)[0]:
            rate = json.loads(path.read_text())["rate"]
            best = self.tuned(rule, rank, alpha, seed, split, rate)
        systems, cost = best
        scored = scores(systems, reading, self.dataset.test)
        return cells.Cell(rule, setting, seed, split, scored, {}, [], cost, {})


def setting_name(rank: int, alpha: float) -> str:
    """What a cell is called beside its rule."""
    return f"rank{rank}-alpha{alpha:g}"


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """A row for every rule, rank and alpha, with its difference from FedIT."""
    from fedrag_jax.evaluation.metrics import percent
    from fedrag_jax.evaluation.significance import bootstrap_interval
    from fedrag_jax.tracking import cells, comparison
    from fedrag_jax.tracking.ledger import mean_cost

    def finished(rule, rank, alpha):
        pairs = replicates(config)
        some = (cells.load(folder, rule, setting_name(rank, alpha), *pair) for pair in pairs)
        return [cell for cell in some if cell]

    rows = []
    for alpha, rank, rule in itertools.product(config.alphas, config.ranks, config.rules):
        if not (found := finished(rule, rank, alpha)):
            continue
        em, nll = (comparison.scores(found, metric) for metric in ("em", "nll"))
        (em_low, em_high), (low, high) = bootstrap_interval(em), bootstrap_interval(nll)
        cost = mean_cost([cell.cost for cell in found])
        path = folder / "rates" / f"{rule}-{setting_name(rank, alpha)}.json"
        row = {
            "rule": rule, "rank": rank, "alpha": alpha, "seeds": len(found),
            "learning_rate": json.loads(path.read_text())["rate"],
            "em": percent(em), "em_low": 100 * em_low, "em_high": 100 * em_high,
            "nll": float(nll.mean()), "nll_low": low, "nll_high": high,
            "bytes_up": cost.bytes_up, "bytes_down": cost.bytes_down, "seconds": cost.seconds,
            "aggregate_seconds": cost.aggregate_seconds, "flops": cost.flops,
            "peak_bytes": cost.peak_bytes,
        }  # fmt: skip
        if rule != "fedit" and (usual := finished("fedit", rank, alpha)):
            row |= comparison.paired_difference(found, usual, config.primary_metric) or {}
        rows.append(row)
    comparison.adjust([row for row in rows if "p" in row])
    return rows


def report(config, folder: pathlib.Path):
    """Writes lora_aggregation.csv and returns the `Report`."""
    from fedrag_jax.tracking import figures
    from fedrag_jax.tracking.report import Report, Section
    from fedrag_jax.tracking.tables import (
        Column,
        Table,
        interval,
        number,
        p_value,
        words,
        write_csv,
    )

    rows = rows_of(config, folder)
    write_csv(folder / "lora_aggregation.csv", rows)
    untuned = json.loads((folder / "untuned.json").read_text())

    def difference(row):
        if "difference" not in row:
            return "–"
        return f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"

    columns = (
        words("rule", "rule"),
        number("rank", "rank", 0),
        Column("α", lambda row: f"{row['alpha']:g}".replace("inf", "∞")),
        Column("rate", lambda row: f"{row['learning_rate']:g}"),
        interval("EM [95% CI]", "em"),
        Column("against FedIT [95% CI]", difference),
        p_value("p", "p_holm"),
        interval("answer NLL [95% CI]", "nll", 2),
        number("MB up", "bytes_up", 2, 1e6),
        number("MB down", "bytes_down", 2, 1e6),
        number("seconds", "seconds"),
        number("of aggregation", "aggregate_seconds", 2),
    )
    c = config
    return Report(
        folder.name,
        f"Adapters of {c.federated.clients} clients averaged by seven rules: {c.data.name}, "
        f"{c.training.rounds} rounds of {c.training.local_steps} local steps. Every prompt holds the "
        f"gold passages; untuned the generator has EM {untuned['em']:.1f} and an NLL of "
        f"{untuned['nll']:.2f} per answer.",
        [
            Section(
                "Figure",
                "rules",
                "Negative log-likelihood of the answers to test questions, with 95% intervals; the "
                "dotted line is the untuned generator.",
                figure=figures.over_rules(rows, untuned["nll"]),
            ),
            Section(
                "Rules",
                "aggregation",
                "EM in percent and NLL with 95% bootstrap intervals over test questions; differences "
                "from FedIT at the same rank and split, paired by question and seed, p by permutation, "
                "Holm-adjusted over this table. FedSA's adapters are personal: means over its clients.",
                Table(columns, rows),
            ),
        ],
    )


def run(config, runs: str) -> pathlib.Path:
    """Every cell; returns the folder of the results.

    Raises:
      ConfigError: an unknown rule, a list that is empty.
      DataError: training, validation or test questions without gold passages.
    """
    from fedrag_jax.federated.fed_lora import RULES
    from fedrag_jax.tracking import cells
    from fedrag_jax.tracking.manifest import write_manifest
    from fedrag_jax.tracking.weights_and_biases import log_cell

    began, folder = time.perf_counter(), pathlib.Path(runs) / config.name
    for name in ("seeds", "rules", "ranks", "alphas", "learning_rates"):
        if not config[name]:
            raise ConfigError(f"config.{name} is empty; give at least one")
    if unknown := [rule for rule in config.rules if rule not in RULES]:
        raise ConfigError(f"config.rules: {unknown} unknown; choose among {[*RULES]}")
    dataset = load_data(config)
    shared = Aggregation(config, dataset, folder)
    asked = [*dataset.train, *shared.validation, *dataset.test]
    if bare := sum(not e.positive_ids for e in asked):
        raise DataError(
            f"{bare} of {len(asked)} questions name no gold passage, which every prompt is to hold "
            "here; give positive_ids"
        )
    for alpha, (_, split) in itertools.product(config.alphas, replicates(config)):
        shared.clients(alpha, split)  # refuses what cannot be split
    folder.mkdir(parents=True, exist_ok=True)
    free = ("seeds", "split_seeds", "rules", "ranks", "alphas", "wandb")
    settled_config(config, folder, free=free)
    write_manifest(folder, dataset, experiment="lora_aggregation", seeds=list(config.seeds))
    if not (folder / "untuned.json").exists():
        reading = shared.reading(config.ranks[0], config.seeds[0])
        found = scores([reading.system], reading, dataset.test)
        untuned = {"em": 100 * float(found["em"].mean()), "nll": float(found["nll"].mean())}
        (folder / "untuned.json").write_text(json.dumps(untuned) + "\n")
    todo = list(itertools.product(config.alphas, config.ranks, config.rules, replicates(config)))
    for i, (alpha, rank, rule, pair) in enumerate(todo, 1):
        if cells.load(folder, rule, setting_name(rank, alpha), *pair):
            continue
        cell = shared.cell(rule, rank, alpha, *pair)
        cells.save(folder, cell)
        wandb = config.wandb
        log_cell(cell, folder, config.name, wandb.mode, wandb.project, config.to_dict())
        print(
            f"[{i}/{len(todo)}] {rule}, rank {rank}, alpha {alpha:g}, {cells.seeds_name(*pair)}: EM "
            f"{100 * cell.scores['em'].mean():.1f}  NLL {cell.scores['nll'].mean():.2f}  "
            f"({time.perf_counter() - began:.0f} s so far)",
            flush=True,
        )
    made = report(config, folder)
    written = made.write(folder)
    print(made.markdown())
    print(f"{folder}/: lora_aggregation.csv {' '.join(written)}")
    return folder


if __name__ == "__main__":
    launch(run, "configs/lora_aggregation.py")
