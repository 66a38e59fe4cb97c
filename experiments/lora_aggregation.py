"""Rules for averaging adapters, on the same clients: quality and bytes of each.

    python -m experiments lora_aggregation

Results go to runs/<name>/: lora_aggregation.csv, table.md, report.html, figures. A cell (rule, rank,
alpha, seeds) that is finished is not computed again.
"""

import dataclasses
import functools
import itertools
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.client_scores import client_scores
from experiments.fitting import fitted
from experiments.lab import Lab, control_scores
from experiments.loading import (
    check_replicates,
    load_data,
    replicates,
    require_known,
    require_some,
    validation_sample,
)
from experiments.rates import at_edge, chosen_rate, kept_rate, one_by_one
from experiments.reporting import cells, comparison, differences, experiment_figures, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import Dataset, require_golds
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.federated.algorithms.fed_lora import RULES, fed_lora
from fedrag_jax.files import kept, read_json, write_json
from fedrag_jax.objectives.generator import concatenated
from fedrag_jax.tracking.ledger import Cost
from fedrag_jax.tracking.processes import everywhere

METRICS = ("em", "f1", "nll")


def with_gold(retriever, examples, k: int) -> np.ndarray:
    """Returns corpus rows [N, k]: each example's gold passages and the nearest others, shuffled."""
    found, _ = retriever.search([e.question for e in examples], k)
    row = {passage.id: i for i, passage in enumerate(retriever.passages)}
    read = []
    for example, nearest in zip(examples, found, strict=True):
        gold = [row[i] for i in example.positive_ids][:k]
        others = [r for r in nearest if r not in gold]
        order = stream(0, "reading order", zlib.crc32(example.id.encode())).permutation(k)
        read.append(np.array([*gold, *others[: k - len(gold)]])[order])
    return np.stack(read)


def rows_for(read: dict[str, np.ndarray], examples) -> np.ndarray:
    """Returns the corpus rows [N, k] of these examples, looked up by id."""
    return np.stack([read[e.id] for e in examples])


def at_point(config, rank: int, alpha: float):
    """Returns the config of a comparison with this adapter rank and this client split."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lora.rank, config.lora.alpha = rank, config.lora.scale * rank
        config.federated.alpha = alpha
    return config


def point_name(rank: int, alpha: float) -> str:
    """Returns the name of a cell's rank and split."""
    return f"rank{rank}-alpha{alpha:g}"


def tuned(run: Lab, read: dict, rule: str, seed: int, split: int, rate: float):
    """Returns `(systems, cost, curves)`: one system, or one per client if adapters are personal.

    Raises:
      DivergenceError: training at this rate ends in numbers that are not finite.
    """

    system = run.system(seed)
    task = concatenated(
        system.decoder,
        system.generator.params,
        system.adapters,
        system.prompts,
        functools.partial(rows_for, read),
    )
    where = f"{rule}, rank {run.config.lora.rank}, alpha {run.config.federated.alpha:g}"
    result = fitted(
        run, task, "federated", split, {"adapters": rate}, seed, f"{where}, rate {rate:g}",
        averaging=functools.partial(fed_lora, rule, system.decoder),
    )  # fmt: skip
    base = jax.device_get(result.frozen["decoder"])
    system = dataclasses.replace(
        system, generator=dataclasses.replace(system.generator, params=base)
    )
    systems = [system.replace(**each) for each in result.trained]
    return systems, result.cost, {rule: result.points}


class Aggregation(NamedTuple):
    """The shared parts of all cells.

    Attributes:
      at: a lab for each rank and split, by the name of the point.
      read: the corpus rows of every question's prompt, by its id.
    """

    config: Any
    folder: pathlib.Path
    dataset: Dataset
    at: dict[str, Lab]
    read: dict[str, np.ndarray]


def compute(lab: Aggregation, point: Point) -> cells.Cell:
    """Trains a cell at the learning rate with the best validation score over the first two seeds."""
    run, read, rule, seed, split = (
        lab.at[point.regime], lab.read, point.name, point.seed, point.split,
    )  # fmt: skip
    config, dataset = run.config, run.dataset
    name = point_name(config.lora.rank, config.federated.alpha)
    validation, pairs = validation_sample(config, dataset), replicates(config)[:2]

    def judge(rate):
        rows = rows_for(read, validation)
        systems = [system for pair in pairs for system in tuned(run, read, rule, *pair, rate)[0]]
        return -float(np.mean([evaluator.answer_nll(s, validation, rows) for s in systems]))

    path, what = run.folder / "rates" / f"{rule}-{name}.json", f"{rule}, {name}"
    rate = chosen_rate(path, config.learning_rates, one_by_one(judge, what), what, pairs)
    systems, cost, curves = tuned(run, read, rule, seed, split, rate)
    clock, clients = Clock(), run.clients("federated", split)
    scores = reading_scores(systems, dataset.test, rows_for(read, dataset.test))
    lap = clock.lap()
    cost += run.corpus_cost(len(clients.clients))
    cost += Cost.of_evaluation(lap)
    everybody = run.mixtures("local" if len(systems) > 1 else "federated", split)
    em = [s["em"] for s in scores]
    by_client = (
        client_scores(everybody, dataset.test, em, config.federated.column) if everybody else []
    )
    mean = {metric: np.mean([s[metric] for s in scores], axis=0) for metric in METRICS}
    # Of the first client where each has one.
    controls = control_scores(systems[0], run.control_questions())
    return cells.Cell(
        rule, name, seed, split, mean, controls, by_client, cost, curves, run.asked_clusters
    )


def reading_scores(systems, examples, rows) -> list[dict[str, np.ndarray]]:
    """Returns `em`, `f1`, `nll` [Q] of each system, reading corpus rows [Q, k]."""
    return [
        evaluator.answers(system, examples, rows)
        | {"nll": evaluator.answer_nll(system, examples, rows)}
        for system in systems
    ]


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every rule, rank and alpha, with its differences from FedIT."""
    rows = []
    for alpha, rank, rule in itertools.product(config.alphas, config.ranks, config.rules):
        point = point_name(rank, alpha)
        if not (found := finished(config, folder, rule, point)):
            continue
        path = folder / "rates" / f"{rule}-{point}.json"
        row = {"rule": rule, "rank": rank, "alpha": alpha, "seeds": len(found)}
        row["learning_rate"] = kept_rate(path)
        for metric, unit in (("em", 100), ("f1", 100), ("nll", 1)):
            row |= comparison.estimate(found, metric, unit=unit)
            if rule != "fedit" and (usual := finished(config, folder, "fedit", point)):
                names = f"{metric}_against_"
                row |= differences.paired_difference(found, usual, metric, unit, prefix=names)
        row |= comparison.costs_and_clients(found) | comparison.control_means(found)
        row["at_edge"] = "edge" if at_edge(path) else ""
        rows.append(row)
    for metric in METRICS:
        differences.adjust(rows, f"{metric}_against_")
    return rows


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    untuned = read_json(folder / "untuned.json")
    who = (
        tables.words("rule", "rule"),
        tables.number("rank", "rank", 0),
        tables.Column("α", lambda row: f"{row['alpha']:g}".replace("inf", "∞")),
    )
    quality = (
        tables.number("seeds", "seeds", 0),
        tables.Column("rate", lambda row: f"{row['learning_rate']:.2g} {row['at_edge']}".strip()),
        tables.interval("NLL [95% CI]", "nll", 2),
        tables.difference("against FedIT [95% CI]", "nll_against_", 2),
        tables.p_value("p", "nll_against_p_holm"),
        tables.p_value("over seeds", "nll_against_p_t_holm"),
        tables.interval("EM [95% CI]", "em"),
        tables.difference("EM against FedIT [95% CI]", "em_against_"),
        tables.p_value("p of EM", "em_against_p_holm"),
        tables.p_value("over seeds", "em_against_p_t_holm"),
        tables.interval("F1 [95% CI]", "f1"),
        tables.difference("F1 against FedIT [95% CI]", "f1_against_"),
        tables.number("worst client", "client_em_worst"),
        tables.number("EM, no passage", "closed_book_em"),
        tables.number("EM, a distractor", "distractor_em"),
    )
    costs = (
        tables.number("MB up", "bytes_up", 2, 1e6),
        tables.number("MB down", "bytes_down", 2, 1e6),
        tables.number("seconds", "seconds"),
        tables.number("of aggregation", "aggregate_seconds", 2),
        tables.number("TFLOP", "flops", 2, 1e12),
        tables.number("peak MB", "peak_bytes", 0, 1e6),
    )
    t = config.training
    return Report(
        folder.name,
        f"Adapters of {config.federated.clients} clients, averaged by different rules: "
        f"{config.data.name}, {t.rounds} rounds of {t.local_steps} local steps. Every prompt "
        f"contains the gold passages. The untuned generator has EM {untuned['em']:.1f} and a "
        f"negative log-likelihood (NLL) of {untuned['nll']:.2f} nats per answer.",
        [
            Section(
                "Figure",
                "rules",
                "NLL of the answers to test questions with 95% intervals; the dotted line is the "
                "untuned generator.",
                figure=experiment_figures.over_rules(rows, untuned["nll"]),
            ),
            Section(
                "Quality",
                "aggregation",
                "NLL (the primary metric), EM and F1 in percent with 95% intervals over "
                "questions and seeds; differences from FedIT at the same rank and split, paired "
                "by question and seed. p over questions (permutation) holds for these models, p "
                "over seeds for the rules; each metric is Holm-adjusted over this table. "
                "Learning rates were searched for every rule, rank and split on validation "
                "answers, with the first two seeds, to a factor of two around the best. Edge: "
                "the best rate is the outermost one tried. FedSA's adapters are personal; its "
                "rows are means over clients. Controls: without a passage, and with a distractor "
                "instead of the gold passages.",
                tables.Table((*who, *quality), rows),
            ),
            Section(
                "Costs",
                "costs",
                "Means over seeds.",
                tables.Table((*who, *costs), rows),
            ),
        ],
        {"lora_aggregation.csv": rows},
    )


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: an unknown rule or metric, a list that is empty, a rank below 1, a rule that would
        change a quantised base.
    """
    check_replicates(config)
    require_some(config, "rules", "ranks", "alphas", "learning_rates")
    require_known("config.rules", config.rules, RULES)
    for name in ("ranks", "learning_rates"):
        if min(config[name]) <= 0:
            raise ConfigError(f"config.{name} must be positive, got {config[name]}")
    changing = [rule for rule in config.rules if RULES[rule].changes_base]
    if config.models.quantize and changing:
        raise ConfigError(
            f"config.rules: {changing} change the base, which config.models.quantize makes "
            f"{config.models.quantize}; leave either out"
        )


def lab(config, folder: pathlib.Path) -> Aggregation:
    """Returns the data and models of the config, with a lab for each of its ranks and splits.

    Raises:
      ConfigError: as `check`.
      DataError: training, validation or test questions without gold passages.
    """
    check(config)
    dataset = load_data(config)
    asked = [*dataset.train, *validation_sample(config, dataset), *dataset.test]
    require_golds(asked, "every prompt needs one here; give positive_ids")
    whole = Lab(at_point(config, config.ranks[0], config.mixtures_alpha), dataset, folder)
    at = {
        point_name(rank, alpha): whole.like(at_point(config, rank, alpha), folder)
        for alpha, rank in itertools.product(config.alphas, config.ranks)
    }
    for there, (_, split) in itertools.product(at.values(), replicates(config)):
        there.budget().schedule("federated")
        there.clients("federated", split)  # refuses what cannot be split
    system = whole.system(config.seeds[0])
    rows = with_gold(system.retriever, asked, system.top_k)
    read = dict(zip([e.id for e in asked], rows, strict=True))
    return Aggregation(config, folder, dataset, at, read)


def points(lab: Aggregation) -> list[Point]:
    """Returns all cells, by split, rank and rule; a key's regime is rank and split."""
    config = lab.config
    return [
        Point(rule, point_name(rank, alpha), *pair, {"rank": rank, "alpha": alpha})
        for alpha, rank, rule, pair in itertools.product(
            config.alphas, config.ranks, config.rules, replicates(config)
        )
    ]


def controls(lab: Aggregation) -> None:
    """Tests the untuned generator on the same prompts and writes its scores to untuned.json."""
    path = lab.folder / "untuned.json"
    if everywhere(kept(read_json, path) is not None):
        return
    system, test = next(iter(lab.at.values())).system(lab.config.seeds[0]), lab.dataset.test
    (found,) = reading_scores([system], test, rows_for(lab.read, test))
    untuned = {"em": 100 * float(found["em"].mean()), "nll": float(found["nll"].mean())}
    write_json(path, untuned)


def summary(cell) -> str:
    """Returns a line with the mean scores of a cell."""
    return f"EM {100 * cell.scores['em'].mean():.1f}  NLL {cell.scores['nll'].mean():.2f}"


EXPERIMENT = Experiment(
    name="lora_aggregation",
    free=("seeds", "split_seeds", "rules", "ranks", "alphas"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
    controls=controls,
)
