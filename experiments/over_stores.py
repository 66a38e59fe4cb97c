"""Which strategies still gain with a better store: tests a finished comparison over other stores.

    python -m experiments over_stores --config.of=runs/real

Nothing is trained: systems are read from the folder of the comparison and answer its test questions
from stores of other kinds over the same passages. Results go to runs/<name>/: over_stores.csv,
table.md, report.html. A cell (store, strategy, regime, seeds) that is finished is not computed again.
"""

import functools
import itertools
import pathlib

from experiments.finished_lab import FinishedLab, require_finished, tested, untuned_of_other_seeds
from experiments.lab import METRICS
from experiments.loading import check_replicates, check_scores, replicates
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.retrieval.stores.registry import new_store
from fedrag_jax.tracking.ledger import Cost

OWN = "vectors"  # what the comparison itself has searched


class OverStores(FinishedLab):
    """Tuned systems, and the stores that they answer from."""

    def __init__(self, config, of: pathlib.Path, folder: pathlib.Path):
        super().__init__(of)
        self.asking, self.results = config, folder
        self.store = functools.lru_cache(maxsize=1)(self._store)

    def _store(self, kind: str):
        """Returns a store of a kind over all passages, with vectors of the untuned document encoder."""
        retriever = self.system(self.config.seeds[0]).retriever
        store = new_store(kind, retriever.vectors.shape[1])
        vectors = None if store.dimension is None else retriever.vectors
        store.add(retriever.passages, vectors)
        return store


def every_point(config) -> list[Point]:
    """Store by store."""
    return [
        Point(strategy, regime, *pair, folder=store)
        for store, strategies in config.stores.items()
        for pair in replicates(config)
        for strategy, regime in tested(strategies, config.regimes)
    ]


def lab(config, folder: pathlib.Path) -> OverStores:
    """Returns the lab of the comparison, with its data and models.

    Raises:
      ConfigError: a comparison that is not there or lacks a cell, an unknown kind of store.
    """
    check_replicates(config)
    check_scores(config)
    require_finished(pathlib.Path(config.of), every_point(config))
    found = OverStores(config, pathlib.Path(config.of), folder)
    dimension = found.system(found.config.seeds[0]).retriever.vectors.shape[1]
    for kind in config.stores:
        new_store(kind, dimension)
    return found


def compute(lab: OverStores, point: Point) -> cells.Cell:
    """Tests one system over one store."""
    if known := untuned_of_other_seeds(lab.asking, lab.results, point):
        return known
    where = point.name, point.regime, point.seed, point.split
    system, clock = lab.tuned(*where).over(lab.store(point.folder)), Clock()
    found = evaluate(system, lab.dataset.test, mode=lab.config.mode)
    cost = Cost.of_evaluation(clock.lap())
    scores = {metric: found[metric] for metric in METRICS}
    return cells.Cell(*where, scores, {}, [], cost, {}, lab.asked_clusters[lab.of_test])


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every store, strategy and regime.

    `<metric>_by_*` are differences from the untuned system over the same store, `<metric>_over_*` from
    the same system over the store that it was tuned with.
    """
    rows, of = [], pathlib.Path(config.of)
    usual = dict.fromkeys(name for names in config.stores.values() for name in names)
    for store, strategies in {OWN: tuple(usual), **config.stores}.items():
        here = of if store == OWN else folder / store
        start = finished(config, here, "none", config.regimes[0])
        for strategy, regime in tested(strategies, config.regimes):
            if not (found := finished(config, here, strategy, regime)):
                continue
            where = "" if strategy == "none" else regime
            row = {"store": store, "strategy": strategy, "regime": where, "seeds": len(found)}
            for metric in METRICS:
                row |= comparison.estimate(found, metric)
                others = {"by": start if strategy != "none" else []}
                if store != OWN:
                    others["over"] = finished(config, of, strategy, regime)
                for prefix, other in others.items():
                    names = f"{metric}_{prefix}_"
                    row |= differences.paired_difference(found, other, metric, prefix=names)
            rows.append(row)
    for metric, prefix in itertools.product(METRICS, ("by", "over")):
        differences.adjust(rows, f"{metric}_{prefix}_")
    return rows


def report(config, folder: pathlib.Path):
    """The `Report` on all finished cells."""
    rows, primary = rows_of(config, folder), config.primary_metric
    who = [tables.words(name, name) for name in ("store", "strategy", "regime")]
    title = comparison.METRICS
    columns = (
        *who,
        tables.number("seeds", "seeds", 0),
        *(tables.interval(f"{title[metric]} [95% CI]", metric) for metric in METRICS),
        tables.difference(f"{title[primary]} against none [95% CI]", f"{primary}_by_"),
        tables.p_value("p", f"{primary}_by_p_holm"),
        tables.difference(f"{title[primary]} against {OWN} [95% CI]", f"{primary}_over_"),
        tables.p_value("p", f"{primary}_over_p_holm"),
    )
    return Report(
        folder.name,
        f"Tuned systems of {config.of} over other stores.",
        [
            Section(
                "Stores and strategies",
                "over_stores",
                f"Metrics in percent with 95% intervals over seeds and questions. {OWN!r} is the exact "
                "search by vectors that the systems were tuned with. Differences are from the untuned "
                f"system over the same store, and from the same system over {OWN!r}, paired by "
                "question and seed; p by permutation over questions, each Holm-adjusted over the "
                "table.",
                tables.Table(columns, rows),
            )
        ],
        {"over_stores.csv": rows},
    )


def summary(cell) -> str:
    """Returns a line with a cell's metrics."""
    return f"EM {100 * cell.scores['em'].mean():.1f}"


EXPERIMENT = Experiment(
    name="over_stores",
    free=("seeds", "split_seeds", "stores", "regimes", "primary_metric"),
    lab=lab,
    points=lambda lab: every_point(lab.asking),
    compute=compute,
    summary=summary,
    report=report,
)
