"""The effect of tuning on the accuracy on a public multiple-choice set, such as MMLU.

    python -m experiments public_sets --config.of=runs/real_ra_dit

Nothing is trained: systems are read from the folder of a comparison. Results go to runs/<name>/:
public_sets.csv, groups.csv, table.md, report.html. Answers are kept as they come, and a cell (way,
corpus, strategy, regime, seeds) that is finished is not computed again.
"""

import collections
import itertools
import pathlib
import re

import numpy as np

from experiments.finished_lab import (
    FinishedLab,
    require_finished,
    tested,
    untuned_of_other_seeds,
)
from experiments.loading import check_replicates, replicates, require_known
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.benchmarks import reading, sets
from fedrag_jax.evaluation.benchmarks.benchmarker import CORPORA, Benchmarker
from fedrag_jax.evaluation.rankings import answer_recall_at_k
from fedrag_jax.files import kept, read_json, write_json
from fedrag_jax.tracking.ledger import Cost
from fedrag_jax.tracking.processes import everywhere

LETTERS = 4  # of a choice that is looked for in passages: "4" and "no" are everywhere
# A two-sided test at 5% has 80% power for a difference of this many standard errors.
POWER = 1.96 + 0.84
PAPER = 100  # questions of FedRAG's test


class Asking(FinishedLab):
    """Tuned systems, and which questions they are asked."""

    def __init__(self, config, of: pathlib.Path, folder: pathlib.Path):
        super().__init__(of)
        self.asking, self.results = config, folder
        self.material = reading.read(sets.named(config.benchmark))

    def groups(self) -> dict[str, dict[str, float]]:
        """`questions` and `coverage` of each group; kept in a file."""
        path = self.results / "groups.json"
        if not everywhere(kept(read_json, path) is not None):
            write_json(path, covered(self.system(self.asking.seeds[0]), self.material.asked))
        return read_json(path)

    def left_out(self) -> set[str]:
        """Returns the ids of questions in groups with too little coverage.

        Raises:
          ConfigError: that is all of them.
        """
        groups, least = self.groups(), self.asking.coverage
        some = {name for name, about in groups.items() if about["coverage"] >= least}
        if not some:
            most = max(groups, key=lambda name: groups[name]["coverage"])
            raise ConfigError(
                f"config.coverage: no group of {self.asking.benchmark} has {least:g}; the most is "
                f"{groups[most]['coverage']:.3f} of {most!r}"
            )
        return {q.id for q in self.material.asked if q.group not in some}


def covered(system, questions) -> dict[str, dict[str, float]]:
    """Returns the number of `questions` of each group and their `coverage`.

    Coverage is the share whose right choice is in one of the passages that the system reads.

    Choices of fewer than four letters count as not read.
    """
    found = system.retrieve([q.question for q in questions])
    counts, told = collections.Counter(), collections.Counter()
    for question, some in zip(questions, found, strict=True):
        right = question.choices[question.label]
        counts[question.group] += 1
        if len(re.findall(r"[^\W\d_]", right)) >= LETTERS:
            texts, rows = [f.passage.text for f in some], np.arange(len(some))[None]
            told[question.group] += float(answer_recall_at_k(rows, texts, [[right]], len(some))[0])
    return {
        group: {"questions": count, "coverage": told[group] / count}
        for group, count in counts.items()
    }


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: a set without choices, another way or corpus, as `require_finished`.
    """
    check_replicates(config)
    known = sets.named(config.benchmark)
    ways = [way for way in sets.KINDS[known.kind] if way in ("likelihood", "letters")]
    if known.kind != "choices":
        raise ConfigError(f"config.benchmark: {known.name} has no choices; take mmlu or hellaswag")
    require_known("config.ways", config.ways, ways)
    require_known("config.corpora", config.corpora, CORPORA)
    if config.questions < 0 or not 0 <= config.coverage <= 1:
        raise ConfigError(
            f"config.questions must be 0 or more and config.coverage in [0, 1], got "
            f"{config.questions} and {config.coverage}"
        )
    require_finished(pathlib.Path(config.of), every_point(config))


def every_point(config) -> list[Point]:
    """Way by way."""
    return [
        Point(strategy, regime, *pair, folder=f"{way}-{corpus}")
        for way, corpus, pair in itertools.product(config.ways, config.corpora, replicates(config))
        for strategy, regime in tested(config.strategies, config.regimes)
    ]


def lab(config, folder: pathlib.Path) -> Asking:
    """Returns the lab: the comparison's systems and the questions of the set.

    Raises:
      ConfigError: as `check`.
      DataError: a set that cannot be read.
    """
    check(config)
    return Asking(config, pathlib.Path(config.of), folder)


def compute(lab: Asking, point: Point) -> cells.Cell:
    """The answers of one system to all questions, chosen in one way from one corpus."""
    if known := untuned_of_other_seeds(lab.asking, lab.results, point):
        return known
    where, config = (point.name, point.regime, point.seed, point.split), lab.asking
    way, _, corpus = point.folder.partition("-")
    here = lab.results / "answers" / f"{point.name}-{point.regime}-{cells.seeds_name(*where[2:])}"
    result = Benchmarker(lab.tuned(*where), here).run(
        config.benchmark,
        by=way,
        corpus=corpus,
        limit=config.questions or None,
        exclude=lab.left_out(),
    )
    names = dict.fromkeys(name for row in result.rows for name in row["scores"])
    scores = {
        name: np.array([row["scores"].get(name) for row in result.rows], np.float64)
        for name in names
    }
    cost, alone = Cost(evaluate_seconds=result.seconds), np.arange(len(result.rows))
    return cells.Cell(*where, scores, {}, [], cost, {}, alone)


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for every scoring, corpus, strategy, regime and metric, against `none`.

    `detectable` is the difference in points that a test of as many questions finds in 80% of all runs,
    `detectable_100` of a hundred such questions.
    """
    rows = []
    for way, corpus in itertools.product(config.ways, config.corpora):
        here = folder / f"{way}-{corpus}"
        start = finished(config, here, "none", config.regimes[0])
        for strategy, regime in tested(config.strategies, config.regimes):
            found = finished(config, here, strategy, regime)
            for metric in found[0].scores if found else ():
                row = {"way": way, "corpus": corpus, "strategy": strategy}
                row |= {"regime": "" if strategy == "none" else regime, "metric": metric}
                row |= {"seeds": len(found), "questions": len(found[0].clusters)}
                row |= comparison.estimate(found, metric, "score")
                if strategy != "none" and start:
                    row |= differences.paired_difference(found, start, metric)
                if "high" in row:
                    row["detectable"] = POWER * (row["high"] - row["low"]) / (2 * 1.96)
                    row["detectable_100"] = row["detectable"] * (row["questions"] / PAPER) ** 0.5
                rows.append(row)
    for metric in {row["metric"] for row in rows}:
        differences.adjust([row for row in rows if row["metric"] == metric])
    return rows


def group_rows(config, folder: pathlib.Path) -> list[dict]:
    """The groups of the set, those that are asked first."""
    found = kept(read_json, folder / "groups.json") or {}
    rows = [
        {"group": name, "asked": "yes" if about["coverage"] >= config.coverage else ""} | about
        for name, about in found.items()
    ]
    return sorted(rows, key=lambda row: -row["coverage"])


def report(config, folder: pathlib.Path):
    """The `Report` on all finished cells."""
    rows, groups = rows_of(config, folder), group_rows(config, folder)
    who = (tables.words(name, name) for name in ("way", "corpus", "strategy", "regime", "metric"))
    columns = (
        *who,
        tables.number("questions", "questions", 0),
        tables.interval("percent [95% CI]", "score"),
        tables.difference("against none [95% CI]"),
        tables.p_value("p", "p_holm"),
        tables.number("detectable", "detectable"),
        tables.number("of 100 questions", "detectable_100"),
    )
    return Report(
        folder.name,
        f"Tuned systems of {config.of} on {config.benchmark}.",
        [
            Section(
                "Accuracy",
                "public_sets",
                "Percent right with 95% intervals. Differences are from the untuned system, chosen in "
                "the same way from the same corpus, paired by question and seed; p by permutation over "
                "questions, Holm-adjusted for each metric. Detectable: the difference in points that "
                "such a test finds in 80% of all runs, with these questions and with 100 such.",
                tables.Table(columns, rows),
            ),
            Section(
                "Groups of questions",
                "groups",
                "How often the right choice stands in a passage that the untuned system reads; asked "
                f"are those with at least {config.coverage:g}.",
                tables.Table(
                    (
                        tables.words("group", "group"),
                        tables.words("asked", "asked"),
                        tables.number("questions", "questions", 0),
                        tables.number("coverage %", "coverage", 1, 0.01),
                    ),
                    groups,
                ),
            ),
        ],
        {"public_sets.csv": rows, "groups.csv": groups},
    )


def summary(cell) -> str:
    """Returns a line with a cell's metrics."""
    return "  ".join(f"{name} {100 * np.nanmean(x):.1f}" for name, x in cell.scores.items())


EXPERIMENT = Experiment(
    name="public_sets",
    free=("seeds", "split_seeds", "strategies", "regimes", "ways", "corpora"),
    lab=lab,
    points=lambda lab: every_point(lab.asking),
    compute=compute,
    summary=summary,
    report=report,
)
