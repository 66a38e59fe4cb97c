"""Policies of index refreshing: the quality, the staleness and the cost of each.

    python -m experiments index_refresh

Results go to runs/<name>/: index_refresh.csv, table.md, report.html, figures. A cell (policy, regime,
seed) that is finished is not computed again.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from experiments.fitting import fitted
from experiments.lab import Lab
from experiments.loading import (
    check_replicates,
    load_data,
    replicates,
    require_known,
    validation_sample,
)
from experiments.rates import chosen_rate, kept_rate, one_by_one
from experiments.reporting import cells, comparison, differences, experiment_figures, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import sample
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation import evaluator
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.objectives.distillation import METHODS
from fedrag_jax.objectives.encoding import as_trained, searching, trained_parts
from fedrag_jax.retrieval.refresh import Policy, search
from fedrag_jax.strategies.objectives import OBJECTIVES
from fedrag_jax.tracking.ledger import Cost

QUERY_SIDE, FRESH = "query_side", "every_1"


class Staleness(Callback):
    """Measures staleness between rounds: the share of probe results that a fresh index replaces."""

    def __init__(self, retriever, policy, probe, k: int, stretch: int):
        self.retriever, self.policy, self.k, self.stretch = retriever, policy, k, stretch
        self.probe, self.shares, self.index = probe, [], None

    def round_end(self, state, record):
        self.index = state.index
        if record["round"] % self.stretch:
            return
        fresh, _ = as_trained(self.retriever, state.state.trainable).search(self.probe, self.k)
        found = self.find(state.state.trainable, self.probe, self.k)
        shares = [np.isin(a, b).mean() for a, b in zip(found, fresh, strict=True)]
        self.shares.append(float(1 - np.mean(shares)))

    def find(self, trained, questions, k: int) -> np.ndarray:
        """Corpus rows [Q, k] that trained encoders find in the last index, as the policy has it."""
        current = as_trained(self.retriever, trained, fresh=False)
        if self.index is None:  # no document vector moves
            return current.search(questions, k)[0]
        return search(self.policy, current, questions, k, self.index["vectors"])[0]


class Refreshing(Lab):
    """The data and system of a comparison, with the generator's scores of passages, computed once."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.taught = None

    def trained(self, name: str, regime: str, seed: int, split: int, factor: float):
        """`(result of training, watch)`."""
        config, system = self.config, self.system(self.config.seeds[0])
        retriever = system.retriever
        if self.taught is None:
            self.taught = OBJECTIVES[config.objective].task(system, self.dataset)
        train, policy = ("query", "document"), None
        if name == QUERY_SIDE:
            train = ("query",)
        else:
            policy = Policy(**config.policies[name])
        trainable, frozen = trained_parts(retriever, train)
        task = dataclasses.replace(
            self.taught,
            name=f"{config.objective}, {name}",
            trainable=trainable,
            frozen=frozen,
            **{"index": None} | searching(retriever, train, system.marginal_k, policy),
        )
        stretch = self.budget().schedule(regime).refresh_every
        probed = sample(self.dataset.validation, config.probe_questions, config.data.sample_seed)
        probe = [e.question for e in probed]
        watch = Staleness(retriever, policy, probe, system.top_k, stretch)
        rate = factor * config.learning_rates[regime]
        what = f"{regime}, {name}, rate {rate:.2g}"
        rates = dict.fromkeys(train, rate)
        return fitted(self, task, regime, split, rates, seed, what, callbacks=[watch]), watch


def compute(lab: Refreshing, point: Point) -> cells.Cell:
    """Trains under a policy; tests with a fresh index and with the index that training left."""
    config, dataset, name, regime = lab.config, lab.dataset, point.name, point.regime
    seed, split = point.seed, point.split
    validation = validation_sample(config, dataset)
    start, first = lab.system(config.seeds[0]).retriever, replicates(config)[0]

    def scores(trained, examples):
        fresh = as_trained(start, trained)
        return evaluator.rank_scores(fresh, examples, evaluator.ranking(fresh, examples)[0])

    def judge(factor):
        result, _ = lab.trained(FRESH, regime, *first, factor)
        return float(np.nanmean(scores(result.trained[0], validation)["mrr"]))

    path = lab.folder / "rates" / f"{regime}.json"
    judged = one_by_one(judge, regime)
    factor = chosen_rate(path, config.rate_factors, judged, regime, [first])
    result, watch = lab.trained(name, regime, seed, split, factor)
    (trained,), clock = result.trained, Clock()
    found = scores(trained, dataset.test)
    depth = min(evaluator.RANKED, len(dataset.passages))
    rows = watch.find(trained, [e.question for e in dataset.test], depth)
    left = evaluator.rank_scores(start, dataset.test, rows)
    found |= {f"{metric}_left": x for metric, x in left.items()}
    cost = result.cost + Cost.of_evaluation(clock.lap())
    told = {"embedded": 0 if watch.index is None else int(watch.index["embedded"])}
    told |= {f"stale_{i}": 100 * share for i, share in enumerate(watch.shares, 1)}
    curves = {name: result.points}
    return cells.Cell(name, regime, seed, split, found, told, [], cost, curves, lab.asked_clusters)


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every policy and regime, with its difference from an always fresh index."""
    rows = []
    for regime, name in itertools.product(config.regimes, config.policies):
        if not (found := finished(config, folder, name, regime)):
            continue
        row = {"policy": name, "regime": regime, "seeds": len(found)}
        for metric in ("recall_at_5", "recall_at_5_left", "mrr"):
            row |= comparison.estimate(found, metric)
        usual = finished(config, folder, FRESH, regime)
        if name != FRESH and usual:
            row |= differences.paired_difference(found, usual, "recall_at_5")
        stale = [
            # In the order of training.
            [share for told, share in cell.controls.items() if told.startswith("stale_")]
            for cell in found
        ]
        row |= {"stale": float(np.mean(stale)), "stale_by_refresh": np.mean(stale, 0).tolist()}
        row |= comparison.costs_and_clients(found)
        row["embedded"] = float(np.mean([cell.controls["embedded"] for cell in found]))
        row["rate"] = config.learning_rates[regime] * kept_rate(folder / f"rates/{regime}.json")
        rows.append(row)
    differences.adjust([row for row in rows if "p" in row])
    return rows


COLUMNS = ("policy", "regime", "seeds", "recall_at_5", "recall_at_5_low", "recall_at_5_high",
           "recall_at_5_left", "recall_at_5_left_low", "recall_at_5_left_high", "mrr", "difference",
           "low", "high", "p_holm", "stale", "embedded", "embed_seconds", "retrieve_seconds",
           "seconds", "flops", "rate")  # fmt: skip


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows = rows_of(config, folder)
    columns = (
        tables.words("policy", "policy"),
        tables.words("regime", "regime"),
        tables.interval("Recall@5 [95% CI]", "recall_at_5"),
        tables.difference("against always fresh [95% CI]"),
        tables.p_value("p", "p_holm"),
        tables.number("last index", "recall_at_5_left"),
        tables.number("stale %", "stale"),
        tables.number("re-embedded", "embedded", 0),
        tables.number("s embedding", "embed_seconds"),
        tables.number("s searching", "retrieve_seconds"),
        tables.number("s in all", "seconds"),
    )
    t = config.training
    return Report(
        folder.name,
        f"Index refresh policies while both encoders are trained by {config.objective}: "
        f"{config.data.name}, {t.rounds} retrievals, each followed by {t.local_steps} x "
        f"{config.federated.clients} steps.",
        [
            Section(
                "Figure",
                "refresh",
                "Left: change in Recall@5 (with a fresh index after training) against the number "
                "of passages re-embedded in training; paired, with 95% intervals over seeds and "
                "questions. Right: staleness of the index before each retrieval and at the end.",
                figure=experiment_figures.refresh_policies(rows),
            ),
            Section(
                "Policies",
                "policies",
                "Scores in percent, means over seeds, 95% intervals over seeds and questions; "
                "differences from `every_1` are paired by question and seed, p by permutation "
                "over questions, Holm-adjusted. Recall@5 uses an index rebuilt after training; "
                "`last index` uses the index that training searched last, with the policy. "
                "Stale: share of the five passages of a validation question that a fresh index "
                "would replace, at the end of an interval between two retrievals. Re-embedded "
                "passages are counted during training.",
                tables.Table(columns, rows),
            ),
        ],
        {"index_refresh.csv": rows},
        {"index_refresh.csv": COLUMNS},
    )


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: an unknown objective, regime or policy, or no policy that is always fresh.
    """
    check_replicates(config)
    require_known("config.objective", config.objective, [*METHODS, "emdr", "replug_log"])
    require_known("config.regimes", config.regimes, config.learning_rates)
    if FRESH not in config.policies:
        raise ConfigError(
            f"config.policies needs {FRESH!r}: learning rates are chosen with it, and other policies "
            "are compared with it"
        )
    for name, policy in config.policies.items():
        try:
            Policy(**policy).check()
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"config.policies: {name!r}: {error}") from error


def lab(config, folder: pathlib.Path) -> Refreshing:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: as `check`.
    """
    check(config)
    return Refreshing(config, load_data(config), folder)


def points(lab: Refreshing) -> list[Point]:
    """Returns all cells, by regime and policy."""
    config = lab.config
    return [
        Point(name, regime, *pair)
        for regime, name, pair in itertools.product(
            config.regimes, config.policies, replicates(config)
        )
    ]


def summary(cell) -> str:
    """Returns a line with a cell's metrics."""
    recall, embedded = np.nanmean(cell.scores["recall_at_5"]), cell.controls["embedded"]
    return f"Recall@5 {100 * recall:.1f}, {embedded} passages re-embedded"


EXPERIMENT = Experiment(
    name="index_refresh",
    free=("seeds", "split_seeds", "regimes"),
    defined=("policies",),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
