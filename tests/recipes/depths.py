"""Recall of the untuned retriever at several depths."""

import numpy as np

from experiments.lab import Lab
from experiments.loading import load_data, replicates
from experiments.reporting import cells, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.tracking.ledger import Cost


def points(lab):
    pairs = replicates(lab.config)
    return [Point(f"depth{k}", "here", *pair) for k in lab.config.depths for pair in pairs]


def compute(lab, point):
    some, k = lab.dataset.test[:50], int(point.name.removeprefix("depth"))
    retriever = lab.system(point.seed).retriever
    rows, _ = retriever.search([e.question for e in some], k)
    ids = [[retriever.passages[r].id for r in row] for row in rows]
    hit = [bool({*e.positive_ids} & {*found}) for e, found in zip(some, ids, strict=True)]
    where = point.name, point.regime, point.seed, point.split
    return cells.Cell(*where, {"recall": np.array(hit, float)}, {}, [], Cost(), {}, np.arange(50))


def report(config, folder):
    found = {k: finished(config, folder, f"depth{k}", "here") for k in config.depths}
    rows = [
        {"depth": k, "recall": 100 * c.scores["recall"].mean()}
        for k, some in found.items()
        for c in some
    ]
    columns = tables.number("depth", "depth", 0), tables.number("Recall", "recall")
    section = Section("Depths", "depths", "In percent.", tables.Table(columns, rows))
    return Report(config.name, "Untuned.", [section], {"depths.csv": rows})


EXPERIMENT = Experiment(
    name="depths",
    free=("depths", "seeds"),
    lab=lambda config, folder: Lab(config, load_data(config), folder),
    points=points,
    compute=compute,
    summary=lambda cell: f"{cell.scores['recall'].mean():.2f}",
    report=report,
)
