"""Personalised models: how well each client's own model answers questions about its own topics.

    python -m experiments personalisation

Results go to runs/<name>/: personalisation.csv, table.md, report.html. A cell (strategy, method, seeds)
that is finished is not computed again.
"""

import functools
import itertools
import pathlib

import numpy as np

from experiments.client_scores import client_scores, mixture_weights, own_scores
from experiments.curves import training_curves
from experiments.fitting import fitted
from experiments.lab import METRICS, Lab
from experiments.loading import (
    check_replicates,
    load_data,
    replicates,
    require_known,
    require_some,
    validation_sample,
)
from experiments.rates import at_edge, chosen_rate, kept_rate, one_by_one
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.comparison import own, own_weight
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.federated.algorithms.by_name import PERSONAL, RULES, personal
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.sweep import require_trained
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.objectives.task import Task
from fedrag_jax.strategies import regimes
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.tuner import tune_together
from fedrag_jax.tracking.ledger import Cost

FEDERATED, ALONE = "federated", "local_converged"
# What is judged, by strategy; F1 and MRR are less noisy than EM.
PRIMARY = {"retriever": "mrr", "generator": "f1"}


def task_of(system, dataset, strategy: str, parts=()) -> Task:
    """Returns the one task of a strategy, or the ranking task of other parts of the retriever."""
    if not parts:
        return next(named(strategy).tasks(system, dataset))
    return multiple_negatives_ranking(
        system.retriever, dataset, train=tuple(parts), score_scale=system.score_scale
    )


def tuned(lab: Lab, strategy: str, method: str, seed: int, split: int, rate: float):
    """Trains a model for each client, or one for all.

    Returns:
      `(systems, cost, curves)`; one system if all clients share it.

    Raises:
      DivergenceError: training diverges at this rate.
    """
    about, system = lab.config.methods[method], lab.system(seed)
    task = task_of(system, lab.dataset, strategy, about.get("parts", ()))
    if method == ALONE:
        there = lab.like(lab.config, lab.folder / "alone" / f"{strategy}-rate{rate:g}")
        tuners = [
            there.tuner(lambda task, part: rate, ALONE, seed, split, client)
            for client in lab.members(ALONE)
        ]
        trained = require_trained(tune_together([(tuner, task) for tuner in tuners]))
        cost = sum((c for tuner in tuners for c in tuner.costs.values()), Cost())
        return [system.replace(**each) for each in trained], cost, training_curves(tuners)
    optimizer = None
    if together := about.get("options", {}).get("together"):
        before = kept_rate(rates_file(lab.folder, strategy, FEDERATED))
        optimizer = fine_tuning(task, lab.budget().rounds, together, before, rate)
    result = fitted(
        lab, task, FEDERATED, split, dict.fromkeys(task.trainable, rate), seed,
        f"{strategy}, {method}, rate {rate:g}",
        averaging=averaging_of(about, system), optimizer=optimizer,
    )  # fmt: skip
    systems = [system.replace(**each) for each in result.trained]
    return systems, result.cost, {task.name: result.points}


def fine_tuning(task: Task, rounds: int, together: int, before: float, rate: float):
    """Returns the optimizer of each round: one client's steps need a lower rate than the mean of many.

    Args:
      before: learning rate of the rounds together, which decays as in federated training.
      rate: of the first round alone; it decays linearly from there.
    """

    def optimizer(round):
        decayed = before * (1 - round / rounds)
        if round >= together:
            decayed = rate * (rounds - round) / (rounds - together)
        return regimes.adamw(dict.fromkeys(task.trainable, decayed))

    return optimizer


def averaging_of(about, system):
    """Returns the function from the options of `Work` to the algorithm of a method."""
    name, options = about.algorithm, dict(about.get("options", {}))
    if name not in PERSONAL:
        return functools.partial(fed_avg, **options)
    if name in RULES:
        options["network"] = system.decoder
    return functools.partial(personal, name, **options)


def own_topics(lab: Lab, strategy: str, systems, clients, examples) -> list[dict[str, np.ndarray]]:
    """Returns the scores [Q] of each system by metric, in [0, 1], on questions about its clients'
    topics; NaN for other questions.
    """
    mixtures = mixture_weights(clients, examples, lab.config.federated.column)
    found = []
    for client, system in enumerate(systems):
        rows = np.flatnonzero(mixtures[client] if len(systems) > 1 else mixtures.any(axis=0))
        asked = [examples[row] for row in rows]
        found.append({metric: np.full(len(examples), np.nan) for metric in METRICS})
        if asked:
            ways = {"retriever": evaluator.rankings_alone, "generator": evaluator.evaluate}
            for metric, scores in ways[strategy](system, asked).items():
                if metric in METRICS:
                    found[-1][metric][rows] = scores
    return found


def compute(lab: Lab, point: Point) -> cells.Cell:
    """Trains at the learning rate that suits the validation questions best, and asks the test
    questions."""
    config, column = lab.config, lab.config.federated.column
    strategy, method, primary = point.name, point.regime, PRIMARY[point.name]
    validation = validation_sample(config, lab.dataset)

    first = replicates(config)[0]

    def judge(rate):
        clients = lab.clients(FEDERATED, first[1])
        systems, _, _ = tuned(lab, strategy, method, *first, rate)
        each = own_topics(lab, strategy, systems, clients, validation)
        scores, weight = own_scores(clients, validation, [f[primary] for f in each], column)
        return float(np.average(np.nan_to_num(scores), weights=weight))

    what = f"{strategy}, {method}"
    rate = chosen_rate(
        rates_file(lab.folder, strategy, method),
        config.learning_rates,
        one_by_one(judge, what),
        what,
        [first],
    )
    systems, cost, curves = tuned(lab, strategy, method, point.seed, point.split, rate)
    clock, clients = Clock(), lab.clients(FEDERATED, point.split)
    each = own_topics(lab, strategy, systems, clients, lab.asked)
    cost += Cost.of_evaluation(clock.lap())
    scores = {}
    for metric in METRICS:
        name = own(metric)
        values = [f[metric] for f in each]
        scores[name], scores[own_weight(name)] = own_scores(clients, lab.asked, values, column)
    by_client = client_scores(clients, lab.asked, [f[primary] for f in each], column)
    controls = {f"client_{number}": score for number, score in enumerate(by_client)}
    return cells.Cell(
        strategy, method, point.seed, point.split, scores, controls, [], cost, curves,
        lab.asked_clusters,
    )  # fmt: skip


def rates_file(folder: pathlib.Path, strategy: str, method: str) -> pathlib.Path:
    """Returns the file of a chosen learning rate."""
    return folder / "rates" / f"{strategy}-{method}.json"


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each strategy and method, with differences from models trained alone and from
    the federated model.

    `better` and `worse` count clients, over seeds, whose model is better or worse than the one trained
    alone.
    """
    rows = []
    for strategy, method in itertools.product(config.strategies, config.methods):
        if not (found := finished(config, folder, strategy, method)):
            continue
        alone = finished(config, folder, strategy, ALONE) if method != ALONE else []
        shared = method not in (ALONE, FEDERATED)
        together = finished(config, folder, strategy, FEDERATED) if shared else []
        path, primary = rates_file(folder, strategy, method), own(PRIMARY[strategy])
        row = {"strategy": strategy, "method": method, "seeds": len(found)}
        row |= {"learning_rate": kept_rate(path), "edge": "edge" if at_edge(path) else ""}
        for metric in METRICS:
            row |= comparison.estimate(found, own(metric), metric)
        if alone:
            row |= differences.paired_difference(found, alone, primary, prefix="by_")
            row |= better_and_worse(found, alone)
        if together:
            names = "from_federated_"
            row |= differences.paired_difference(found, together, primary, prefix=names)
        rows.append(row | comparison.costs_and_clients(found))
    differences.adjust(rows, "by_")
    differences.adjust(rows, "from_federated_")
    return rows


def better_and_worse(found, others) -> dict[str, int]:
    """Returns the numbers of clients, over the seeds in common, with a better and a worse score."""
    partner = {(cell.seed, cell.split): cell.controls for cell in others}
    pairs = [
        (score, partner[cell.seed, cell.split][client])
        for cell in found
        if (cell.seed, cell.split) in partner
        for client, score in cell.controls.items()
    ]
    return {"better": sum(a > b for a, b in pairs), "worse": sum(a < b for a, b in pairs)}


def report(config, folder: pathlib.Path) -> Report:
    """Returns the `Report` on all finished cells."""
    rows, title, t = rows_of(config, folder), comparison.METRICS, config.training
    columns = (
        tables.words("strategy", "strategy"),
        tables.words("method", "method"),
        tables.number("seeds", "seeds", 0),
        tables.Column("rate", lambda row: f"{row['learning_rate']:.2g} {row['edge']}".strip()),
        *(tables.interval(f"{title[metric]} [95% CI]", metric) for metric in METRICS),
        tables.difference("MRR@10 or F1 against alone [95% CI]", "by_"),
        tables.p_value("p", "by_p_holm"),
        tables.difference("against one federated model [95% CI]", "from_federated_"),
        tables.p_value("p", "from_federated_p_holm"),
        tables.number("clients better", "better", 0),
        tables.number("clients worse", "worse", 0),
        tables.words("epochs", "epochs"),
        tables.number("MB up", "bytes_up", 2, 1e6),
        tables.number("seconds", "seconds"),
    )
    return Report(
        folder.name,
        f"Models of {config.federated.clients} clients' own, alpha = {config.federated.alpha:g}: "
        f"{config.data.name}, {t.rounds} rounds of {t.local_steps} local steps.",
        [
            Section(
                "Clients' own topics",
                "personalisation",
                "Scores in percent on test questions about each client's own topics, in the client's "
                "proportions, with 95% intervals over seeds and questions. Differences are from models "
                "that clients train alone until validation stops improving, and of personal models "
                "from the federated one, in MRR@10 for the retriever and F1 for the generator, paired "
                "by question and seed; p by permutation, Holm-adjusted over each column. Clients "
                "better and worse are counted over all seeds.",
                tables.Table(columns, rows),
            )
        ],
        {"personalisation.csv": rows},
    )


def lab(config, folder: pathlib.Path) -> Lab:
    """Returns the data and models of the config.

    Raises:
      ConfigError: no strategies, methods or learning rates; a strategy or algorithm that is unknown.
    """
    check_replicates(config)
    require_some(config, "strategies", "methods", "learning_rates")
    require_known("config.strategies", config.strategies, PRIMARY)
    for name, about in config.methods.items():
        if name == ALONE:
            continue
        known = ("fedavg", *PERSONAL)
        if about.get("options", {}).get("together") and FEDERATED not in config.methods:
            raise ConfigError(
                f"config.methods.{name} fine-tunes the federated model, so it needs the method "
                f"{FEDERATED!r} and its learning rate"
            )
        if (algorithm := about.get("algorithm")) not in known:
            raise ConfigError(
                f"config.methods.{name}.algorithm must be one of {[*known]}, got {algorithm!r}"
            )
        if algorithm == "fedavg":
            by_name.check(algorithm, dict(about.get("options", {})), f"config.methods.{name}")
    found = Lab(config, load_data(config), folder)
    clients = found.clients(FEDERATED, replicates(config)[0][1])
    if not mixture_weights(
        clients, validation_sample(config, found.dataset), config.federated.column
    ).any():
        raise ConfigError(
            f"config.data.name: no validation question of {config.data.name} is about a topic that "
            "clients train on, so learning rates cannot be judged; choose data whose splits share "
            "topics"
        )
    return found


def points(lab: Lab) -> list[Point]:
    """Returns all points, seed by seed."""
    config = lab.config
    return [
        Point(strategy, method, *pair)
        for pair, strategy, (method, about) in itertools.product(
            replicates(config), config.strategies, config.methods.items()
        )
        if strategy in (about.get("strategies", ()) or config.strategies)
    ]


def summary(cell) -> str:
    """Returns the line that is printed for a finished cell."""
    scores = ((comparison.METRICS[m], comparison.estimate([cell], own(m), m)[m]) for m in METRICS)
    return "  ".join(f"{name} {value:.1f}" for name, value in scores if value is not None)


EXPERIMENT = Experiment(
    name="personalisation",
    free=("seeds", "split_seeds", "strategies"),
    defined=("methods",),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
