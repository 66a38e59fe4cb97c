"""Learning to search: exact match and searches of one-hop and two-hop questions, by variant.

    python -m experiments research

A policy that searches as it writes is warmed up on its form and trained by policy gradients
(ReSearch, 2503.19470; Search-R1, 2503.09516); other variants are strategies that retrieve once. All
see as many training questions. Results go to runs/<name>/: research.csv, table.md, report.html,
figures. A cell (variant, regime, seeds) that is finished is not computed again, nor is a training.

The default takes 28 minutes on 2 cores of a first-generation AMD EPYC. The ablation `search_unmasked`
is trained with one seed (`config.pairs`). Time grows with the number of questions, rollouts
per question and tokens per rollout; half of it are gradient steps, a quarter rollouts.
"""

import dataclasses
import functools
import itertools
import pathlib

import numpy as np

from experiments.curves import training_curves
from experiments.lab import Lab
from experiments.loading import check as check_comparison
from experiments.loading import load_data, replicates
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.page import Report, Section
from experiments.reporting.policy_figures import policy_curves
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.collapse import CollapseSigns
from fedrag_jax.generation.inference import SEARCH
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.policies import learn_to_search, search_form
from fedrag_jax.strategies.strategy import Strategy
from fedrag_jax.tracking.ledger import Cost

HOPS = {"one_hop": 1, "two_hop": 2}
COLUMNS = (
    "variant", "regime", "one_hop_em", "two_hop_em", "searches_one_hop", "searches_two_hop", "seeds",
)  # fmt: skip
RATES = {"search_format": "search_form", "policy": "search", "policy_unmasked": "search"}


def variant(config, name: str, seed: int) -> Strategy:
    """Returns the strategy of a variant: one that searches, or one of compare_strategies.

    Raises:
      ConfigError: there is none of that name.
    """
    how = config.policy.to_dict()
    searching = {
        "search_form": functools.partial(search_form, seed=seed),
        "search": functools.partial(learn_to_search, seed=seed, **how),
        "search_unmasked": functools.partial(learn_to_search, seed=seed, masked=False, **how),
    }
    if name not in searching:
        return named(name)
    return Strategy(name, searching[name], rates=RATES, mode=SEARCH)


def as_many_of_each(dataset: Dataset) -> Dataset:
    """Returns the data set with equally many one-hop and two-hop training questions, alternating."""
    by_hops = [[e for e in dataset.train if e.hops == hops] for hops in HOPS.values()]
    if not all(by_hops):
        return dataset
    pairs = zip(*by_hops, strict=False)  # of the shorter
    return dataclasses.replace(dataset, train=[e for pair in pairs for e in pair])


def compute(lab: Lab, point: Point) -> cells.Cell:
    """Trains a variant and asks the test questions."""
    strategy = variant(lab.config, point.name, point.seed)
    where = point.regime, point.seed, point.split
    systems, tuners = [lab.system(point.seed)], []
    if point.name != "none":
        systems, tuners = lab.tuned_systems(strategy, *where)
    clock, test = Clock(), lab.dataset.test
    found = [evaluate(system, test, mode=strategy.mode or "concatenated") for system in systems]
    lap = clock.lap()
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), Cost())
    cost += Cost.of_evaluation(lap)
    scores = {}
    once = np.ones(len(test))
    for name, hops in HOPS.items():
        asked = np.array([e.hops == hops for e in test])
        for metric in ("em", "f1", "searches"):
            mean = np.mean([f.get(metric, once) for f in found], axis=0)
            scores[f"{name}_{metric}"] = np.where(asked, mean, np.nan)
    curves = training_curves(tuners)
    controls = {
        f"{task}_collapsed_at": float(CollapseSigns().look_back(rounds))
        for task, rounds in curves.items()
        if "reward" in rounds[0]["metrics"] and len(tuners) == 1
    }
    return cells.Cell(
        point.name, *where, scores, controls, [], cost, curves, lab.asked_clusters,
        tuners[0].labels if tuners else {},
    )  # fmt: skip


def by_two_hops(row: dict) -> list[float]:
    """The order of rows with one retrieval: two-hop EM, then one-hop EM."""
    return [row[f"{hops}_em"] or 0 for hops in ("two_hop", "one_hop")]


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each variant and regime; `two_hop_by_*` compares with the best single
    retrieval of the regime, by two-hop EM."""
    rows = []
    for regime, names in config.variants.items():
        for name in names:
            if not (found := finished(config, folder, name, regime)):
                continue
            row = {"variant": name, "regime": regime, "seeds": len(found), "cells": found}
            for hops in HOPS:
                row |= comparison.estimate(found, f"{hops}_em")
                asked = comparison.estimate(found, f"{hops}_searches", unit=1.0)
                row[f"searches_{hops}"] = asked[f"{hops}_searches"]
            row |= comparison.costs_and_clients(found)
            watched = [cell.controls for cell in found if cell.controls]  # policies of one model
            row["collapsed"] = sum(any(c.values()) for c in watched) if watched else None
            rows.append(row)
    best: dict[str, dict] = {}
    for row in rows:
        if not row["variant"].startswith("search"):
            best[row["regime"]] = max(best.get(row["regime"], row), row, key=by_two_hops)
    for row in rows:
        against = best.get(row["regime"], row)
        if row is not against:
            both, names = (row["cells"], against["cells"]), "two_hop_by_"
            row |= differences.paired_difference(*both, "two_hop_em", prefix=names)
            row["against"] = against["variant"]
    for row in rows:
        del row["cells"]
    differences.adjust(rows, "two_hop_by_")
    return rows


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    found = [
        cell
        for regime, names in config.variants.items()
        for name in names
        for cell in finished(config, folder, name, regime)
    ]
    against = (
        "Differences are from the best of these in the same regime by two-hop EM, paired by question "
        "and seed; p by permutation, Holm-adjusted. "
        if any("against" in row for row in rows)
        else ""
    )
    columns = (
        tables.words("variant", "variant"),
        tables.words("regime", "regime"),
        tables.number("seeds", "seeds", 0),
        tables.interval("one-hop EM [95% CI]", "one_hop_em"),
        tables.interval("two-hop EM [95% CI]", "two_hop_em"),
        *(
            (
                tables.words("against", "against"),
                tables.difference("two-hop EM, difference [95% CI]", "two_hop_by_"),
                tables.p_value("p", "two_hop_by_p_holm"),
            )
            if against
            else ()
        ),
        tables.number("searches, one hop", "searches_one_hop", 2),
        tables.number("searches, two hops", "searches_two_hop", 2),
        tables.number("collapsed", "collapsed", 0),
    )
    costs = (
        tables.words("variant", "variant"),
        tables.words("regime", "regime"),
        tables.words("epochs", "epochs"),
        tables.number("seconds", "seconds", 0),
        tables.number("rollouts and retrieval", "retrieve_seconds", 0),
        tables.number("MB up", "bytes_up", 1, 1e6),
    )
    return Report(
        folder.name,
        f"Learning to search, against tuning with one retrieval: {config.data.name}.",
        [
            Section(
                "Answers and searches",
                "research",
                "Exact match in percent with 95% intervals over seeds and questions. Variants "
                f"with one retrieval read {config.retrieval.top_k} passages; a search returns "
                f"one. {against}Collapsed: number of trainings with a sign of collapse at any time "
                "(fedrag_jax/federated/collapse.py).",
                tables.Table(columns, rows),
            ),
            Section(
                "Costs", "costs", "Costs of training, means over seeds.", tables.Table(costs, rows)
            ),
            Section(
                "How the policy learns",
                "policy_curves",
                "Rollouts of each round: mean over seeds, with a band from minimum to maximum.",
                figure=policy_curves(found),
            ),
        ],
        {"research.csv": rows},
        {"research.csv": COLUMNS},
    )


def lab(config, folder: pathlib.Path) -> Lab:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: as `loading.check`; an unknown variant; a negative number of pairs.
    """
    asked = config.copy_and_resolve_references()
    with asked.unlocked():
        asked.regimes = tuple(config.variants)
        asked.strategies = ("none",)
    check_comparison(asked)
    for name in (*itertools.chain(*config.variants.values()), *config.pairs):
        variant(config, name, 0)
    for name, count in config.pairs.items():
        if count < 0:
            raise ConfigError(
                f"config.pairs.{name} is {count}; give a number of pairs of seeds, or 0 for all"
            )
    if not any(config.variants.values()):
        raise ConfigError("config.variants is empty; give at least one of a regime")
    return Lab(asked, as_many_of_each(load_data(config)), folder)


def points(lab: Lab) -> list[Point]:
    """Returns all cells, by seed, so that all variants have a first result early."""
    return [
        Point(name, regime, *pair)
        for i, pair in enumerate(replicates(lab.config))
        for regime, names in lab.config.variants.items()
        for name in names
        if i < (lab.config.pairs.get(name, 0) or i + 1)
    ]


def summary(cell) -> str:
    """Returns a line with a cell's metrics."""
    return "  ".join(
        f"{hops.replace('_', '-')} EM {100 * np.nanmean(cell.scores[f'{hops}_em']):.1f} "
        f"({np.nanmean(cell.scores[f'{hops}_searches']):.2f} searches)"
        for hops in HOPS
        if not np.isnan(cell.scores[f"{hops}_em"]).all()
    )


EXPERIMENT = Experiment(
    name="research",
    free=("seeds", "split_seeds", "variants", "pairs"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
