"""Recall of a real retriever on SQuAD and HotpotQA, before and after query-side tuning.

    python -m experiments tune_retrieval

Results go to runs/<name>/: retrieval.csv, table.md, report.html. A cell (dataset, method, regime,
seed) lies in a folder of its dataset and is not computed again. Corpora are embedded once and cached
on disk.
"""

import functools
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.curves import training_curves
from experiments.loading import check_replicates, replicates, require_known
from experiments.rates import at_edge, chosen_rate, kept_rate, one_by_one
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.comparison import estimate
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.data import datasets
from fedrag_jax.data.examples import Dataset, clusters, sample
from fedrag_jax.evaluation import evaluator
from fedrag_jax.federated.sweep import require_trained
from fedrag_jax.models import hub
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.retrieval.clusters import with_topics
from fedrag_jax.retrieval.mining import Mining
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.strategies.regimes import Budget, Stopping, parse, split_clients
from fedrag_jax.strategies.tuner import Tuner, tune_together
from fedrag_jax.tracking.ledger import Cost
from fedrag_jax.tracking.manifest import write_manifest

UNTUNED = "untuned"
METRICS = {"recall_at_1": "Recall@1", "recall_at_5": "Recall@5", "recall_at_20": "Recall@20",
           "mrr": "MRR@10"}  # fmt: skip


class Prepared(NamedTuple):
    """The shared parts of a dataset's cells.

    Attributes:
      folder: of the dataset's cells, rates and trained encoders.
      validation: questions that choose rates and decide when to stop.
    """

    config: object
    folder: pathlib.Path
    dataset: Dataset
    validation: list
    retriever: object


def prepare(config, name: str, folder: pathlib.Path, model) -> Prepared:
    """A dataset with samples of its labelled questions, and its embedded corpus."""
    loaded, seed = datasets.load(name), config.sample_seed
    train, validation, test = (
        sample([e for e in getattr(loaded, split) if e.positive_ids], count, seed)
        for split, count in (
            ("train", config.train_questions),
            ("validation", config.validation_questions),
            ("test", config.test_questions),
        )
    )
    dataset = Dataset(loaded.name, loaded.passages, train, validation, test)
    here = folder / loaded.name
    here.mkdir(parents=True, exist_ok=True)
    write_manifest(here, dataset, experiment="tune_retrieval", seeds=list(config.seeds))
    retriever = Retriever.build(model, dataset.passages, progress=True)
    dataset = with_topics(dataset, retriever)
    return Prepared(config, here, dataset, dataset.validation, retriever)


class Retrieval:
    """The model, and one dataset at a time: its samples and its embedded corpus."""

    def __init__(self, config, folder: pathlib.Path):
        self.config, self.folder = config, folder
        self.model = hub.load(config.retriever)
        self.prepared = functools.lru_cache(maxsize=1)(self._prepare)

    def _prepare(self, name: str) -> Prepared:
        asked = {pathlib.Path(asked).name: asked for asked in self.config.datasets}
        return prepare(self.config, asked[name], self.folder, self.model)

    @property
    def dataset(self) -> Dataset:
        """The first, which the manifest of the run is about; each has a manifest of its own."""
        return self.prepared(pathlib.Path(self.config.datasets[0]).name).dataset


def rank_scores(retriever, examples) -> dict[str, np.ndarray]:
    """Recall@1, 5, 20 and MRR@10 of each example [Q]."""
    depth = min(20, len(retriever.passages))
    ranked, _ = retriever.search([e.question for e in examples], depth)
    return evaluator.rank_scores(retriever, examples, ranked, depths=(1, 5, 20))


def method_of(config, name: str) -> tuple[int, dict]:
    """Returns `(batch size, options of multiple_negatives_ranking)` of a training method.

    Raises:
      ConfigError: there is none of that name.
    """
    size = config.batch_size
    methods = {
        "in_batch": (size, {}),
        "mined": (size, {"mining": Mining(config.mined)}),
        "large_batch": (size * config.large_batch, {"at_once": size}),
    }
    require_known("config.methods", [name], methods)
    return methods[name]


def tuned(prepared: Prepared, method: str, regime: str, seed: int, split: int, rate: float):
    """`(encoders, tuners)`: one query encoder, in the local regimes one a client."""
    c, dataset = prepared.config, prepared.dataset
    known = parse(regime, c.alpha)
    clients = split_clients(dataset.train, c.clients, known.alpha, "topic", split, c.min_examples)
    batch_size, options = method_of(c, method)
    budget = Budget(c.rounds, c.local_steps, c.clients, batch_size)
    if known.converged:
        stopping = Stopping(c.converged.every, c.converged.patience)
        budget = budget._replace(rounds=c.rounds * c.converged.cap, stopping=stopping)
    folder = prepared.folder / "tuned" / f"{method}-{regime}-seed{seed}-{split}" / f"lr{rate:g}"
    tuners = [
        Tuner(
            folder=folder if client is None else folder / f"client{client}",
            regime=known.kind,
            examples=dataset.train,
            clients=clients,
            budget=budget,
            rates=lambda task, part: rate,
            seed=seed,
            client=client,
            checkpoint_every=c.rounds,
            validation=prepared.validation if known.converged else (),
        )
        for client in (range(c.clients) if known.kind == "local" else (None,))
    ]
    task = multiple_negatives_ranking(
        prepared.retriever, dataset, max_question_tokens=c.max_question_tokens, **options
    )
    found = require_trained(tune_together([(tuner, task) for tuner in tuners]))
    return [trained["query"] for trained in found], tuners


def rate_path(folder: pathlib.Path, regime: str) -> pathlib.Path:
    """Returns the path of a regime's rate, searched for `in_batch` and used by all methods."""
    return folder / "rates" / f"{regime}.json"


def known_rate(config, dataset: str, regime: str) -> float:
    """Returns the config's rate for this retriever; 0 if it has to be searched."""
    rates = config.get("rates", {})  # runs of before have none
    return rates.get(config.retriever, {}).get(dataset, {}).get(regime, 0.0)


def compute(lab: Retrieval, point: Point) -> cells.Cell:
    """Trains at the rate that suits validation questions best, with the first pair of seeds."""
    prepared, method, regime = lab.prepared(point.folder), point.name, point.regime
    config, test, seed, split = lab.config, prepared.dataset.test, point.seed, point.split
    retrievers, tuners, controls = [prepared.retriever], [], {}
    if method != UNTUNED:
        first = replicates(config)[0]

        def judge(rate):
            encoders, _ = tuned(prepared, "in_batch", regime, *first, rate)
            scores = [
                rank_scores(prepared.retriever.with_query(q), prepared.validation)["mrr"]
                for q in encoders
            ]
            return 100 * float(np.mean(scores))

        path, what = rate_path(prepared.folder, regime), f"{prepared.dataset.name}, {regime}"
        rate = known_rate(config, prepared.dataset.name, regime) or chosen_rate(
            path, config.learning_rates, one_by_one(judge, what), what, [first]
        )
        controls = {"learning_rate": rate}
        encoders, tuners = tuned(prepared, method, regime, seed, split, rate)
        retrievers = [prepared.retriever.with_query(q) for q in encoders]
    found = [rank_scores(retriever, test) for retriever in retrievers]
    scores = {metric: np.mean([f[metric] for f in found], axis=0) for metric in found[0]}
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), Cost())
    about = clusters([e.positive_ids for e in test], prepared.dataset.passages)
    curves = training_curves(tuners)
    return cells.Cell(method, regime, seed, split, scores, controls, [], cost, curves, about)


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """A row for every dataset, regime and method, with its differences from the untuned retriever."""
    rows = []
    for name in config.datasets:
        here = folder / pathlib.Path(name).name
        start = finished(config, here, UNTUNED, config.regimes[0])
        if not start:
            continue
        rows.append({"dataset": name, "regime": "", "method": UNTUNED} | metrics(start))
        for regime, method in itertools.product(config.regimes, config.methods):
            if not (found := finished(config, here, method, regime)):
                continue
            path = rate_path(here, regime)
            row = {"dataset": name, "regime": regime, "method": method, "seeds": len(found)}
            given = known_rate(config, pathlib.Path(name).name, regime)
            used = found[0].controls.get("learning_rate")  # cells of older versions have none
            row["learning_rate"] = used or given or kept_rate(path)
            row["at_edge"] = "edge" if not given and at_edge(path) else ""
            row |= metrics(found) | comparison.costs_and_clients(found)
            for metric in METRICS:
                row |= differences.paired_difference(found, start, metric, prefix=f"{metric}_by_")
            rows.append(row)
    for metric in METRICS:
        differences.adjust(rows, f"{metric}_by_")
    return rows


def metrics(cells) -> dict[str, float]:
    """Every metric with its interval."""
    return {name: x for metric in METRICS for name, x in estimate(cells, metric).items()}


def report(config, folder: pathlib.Path):
    """The `Report` on all finished cells."""
    rows = rows_of(config, folder)
    who = [tables.words(name, name) for name in ("dataset", "regime", "method")]
    rate = tables.Column(
        "rate",
        lambda row: (
            f"{row['learning_rate']:.2g} {row.get('at_edge', '')}".strip()
            if "learning_rate" in row
            else tables.MISSING
        ),
    )
    against = (
        column
        for metric, title in METRICS.items()
        for column in (
            tables.difference(f"{title} [95% CI]", f"{metric}_by_"),
            tables.p_value("p", f"{metric}_by_p_holm"),
        )
    )
    return Report(
        folder.name,
        f"Query-side tuning of {config.retriever}, {config.clients} clients, Dirichlet alpha "
        f"{config.alpha:g} over articles or, where they are not known, clusters of questions.",
        [
            Section(
                "Retrieval",
                "retrieval",
                "Percent of test questions with 95% intervals over seeds and articles. Rates are "
                "those of the config or, where it has none, chosen by validation MRR from one grid "
                "for all regimes, to a factor of two around the best; edge: the best is the "
                "outermost that was tried. Epochs of the model that was kept.",
                tables.Table(
                    [
                        *who,
                        *(tables.interval(title, metric) for metric, title in METRICS.items()),
                        rate,
                        tables.words("epochs", "epochs"),
                        tables.number("seconds", "seconds", 0),
                        tables.number("MB up", "bytes_up", 0, 1e6),
                    ],
                    rows,
                ),
            ),
            Section(
                "Against the untuned retriever",
                "differences",
                "Differences in points, paired by question and seed; p by permutation over "
                "articles, Holm-adjusted for each metric.",
                tables.Table([*who, *against], [r for r in rows if r["method"] != UNTUNED]),
            ),
        ],
        {"retrieval.csv": rows},
    )


def lab(config, folder: pathlib.Path) -> Retrieval:
    """Returns the lab with the model and data of the config.

    Raises:
      ConfigError: an unknown method or regime, or seeds that do not make pairs.
    """
    check_replicates(config)
    for method in config.methods:
        method_of(config, method)  # refuses what there is not
    for regime in config.regimes:
        parse(regime, config.alpha)
    return Retrieval(config, folder)


def points(lab: Retrieval) -> list[Point]:
    """Dataset by dataset, each in a folder of its name; the untuned retriever first."""
    config, found = lab.config, []
    for name in config.datasets:
        ways = [(UNTUNED, config.regimes[0])]
        for regime, method in itertools.product(config.regimes, config.methods):
            if regime.startswith("local") and method == "large_batch":
                print("large_batch is left out of local training: clients hold too few questions")
                continue
            ways.append((method, regime))
        for way in ways:
            pairs = replicates(config)
            if way[1] == "local_converged" and way[0] != UNTUNED:
                pairs = pairs[: config.converged.get("pairs", 0) or None]
            found += [Point(*way, *pair, folder=pathlib.Path(name).name) for pair in pairs]
    return found


def summary(cell) -> str:
    """The means of a cell's scores, for people."""
    return "  ".join(f"{METRICS[m]} {100 * np.mean(cell.scores[m]):.1f}" for m in METRICS)


EXPERIMENT = Experiment(
    name="tune_retrieval",
    free=("regimes", "datasets", "methods", "seeds", "split_seeds"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
