"""What the tuned systems of a finished comparison give away: training questions, and passages.

    python -m experiments leakage --config.of=runs/real

Nothing is trained: systems are read from the folder of the comparison. Losses of questions that were
trained on are compared with losses of others, and prompts ask for the passages that a system reads.
Results go to runs/<name>/: membership.csv, repeated.csv, table.md, report.html. A cell (strategy,
regime, seeds) that is finished is not computed again.
"""

import pathlib

import numpy as np

from experiments.finished_lab import FinishedLab, require_finished, tested
from experiments.loading import check_replicates, replicates
from experiments.reporting import cells, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import Example, sample
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import answer_nll
from fedrag_jax.evaluation.leakage import extraction
from fedrag_jax.evaluation.leakage.membership import by_loss, calibrated
from fedrag_jax.evaluation.leakage.roc import Attack, auc, estimate, tpr_at_fpr
from fedrag_jax.evaluation.leakage.signals import ranking_nll
from fedrag_jax.tracking.ledger import Cost

SIGNALS = {
    "read": "answer, with passages",
    "closed": "answer, without passages",
    "ranked": "rank of the gold passage",
}
SAID = 64  # tokens that a prompt for passages is answered with


class Suspects(FinishedLab):
    """Tuned systems, and the questions that an attacker asks about.

    Attributes:
      questions: training questions and others.
      member: bool [N], which were trained on.
      group: int [N], the topic of each; without topics, the question.
    """

    def __init__(self, config, of: pathlib.Path):
        super().__init__(of)
        self.asking = config
        others = [e for e, own in zip(self.asked, self.of_own, strict=True) if own]
        members, others = (
            sample(some, config.questions, 0) for some in (self.dataset.train, others)
        )
        self.questions: list[Example] = [*members, *others]
        self.member = np.arange(len(self.questions)) < len(members)
        names = [e.topic or e.id for e in self.questions]
        self.group = np.unique(names, return_inverse=True)[1]


def every_point(config) -> list[Point]:
    """Returns all cells, by seeds and system."""
    return [
        Point(strategy, regime, *pair)
        for pair in replicates(config)
        for strategy, regime in tested(config.strategies, config.regimes)
    ]


def lab(config, folder: pathlib.Path) -> Suspects:
    """Returns the lab of the comparison, with its data and models.

    Raises:
      ConfigError: a comparison that is not there or lacks a cell, a number out of its range, no untuned
        system to compare with.
    """
    check_replicates(config)
    for name, least in (("questions", 0), ("prompted", 1), ("said_words", 1)):
        if config[name] < least:
            raise ConfigError(f"config.{name} must be at least {least}, got {config[name]}")
    if "none" not in config.strategies:
        raise ConfigError("config.strategies needs 'none': attacks compare with the untuned system")
    require_finished(pathlib.Path(config.of), every_point(config))
    return Suspects(config, pathlib.Path(config.of))


def compute(lab: Suspects, point: Point) -> cells.Cell:
    """Computes the losses of all questions under one system, and asks it for its passages."""
    where, asked = (point.name, point.regime, point.seed, point.split), lab.questions
    system, clock = lab.tuned(*where), Clock()
    rows, _ = system.retriever.search([e.question for e in asked], system.top_k)
    scores = {
        "read": answer_nll(system, asked, rows),
        "closed": answer_nll(system, asked, np.zeros((len(asked), 0), int)),
        "member": lab.member.astype(float),
    }
    if all(e.positive_ids for e in asked):
        scores["ranked"] = ranking_nll(system.retriever, asked, system.score_scale)
    about = [e.question for e in sample(lab.dataset.test, lab.asking.prompted, 0)]
    said = extraction.repeated(system, about, lab.asking.said_words, max_new_tokens=SAID)
    lap = clock.lap()
    cost = Cost(evaluate_seconds=lap.others + lap.searching, compile_seconds=lap.compiling)
    return cells.Cell(*where, scores, {"said": 100 * said}, [], cost, {}, lab.group)


def all_found(config, folder: pathlib.Path) -> list[tuple[dict, list[cells.Cell]]]:
    """Returns the finished cells of each system, with its `strategy`, `regime` and `seeds`."""
    systems = []
    for strategy, regime in tested(config.strategies, config.regimes):
        if found := finished(config, folder, strategy, regime):
            where = "" if strategy == "none" else regime
            systems.append(({"strategy": strategy, "regime": where, "seeds": len(found)}, found))
    return systems


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each system and signal: AUC and TPR by the loss alone, and by the difference
    from the loss of the untuned system."""
    rows, systems = [], all_found(config, folder)
    untuned = (found for about, found in systems if about["strategy"] == "none")
    start = {(cell.seed, cell.split): cell for cell in next(untuned, ())}
    for about, found in systems:
        member = found[0].scores["member"] > 0
        about = about | {"members": int(member.sum()), "others": int((~member).sum())}
        for signal in [name for name in SIGNALS if name in found[0].scores]:
            row = about | {"signal": signal}
            row |= _told("loss", [by_loss(cell.scores[signal]) for cell in found], found)
            pairs = [(cell, start.get((cell.seed, cell.split))) for cell in found]
            if about["strategy"] != "none" and all(before for _, before in pairs):
                some = [calibrated(c.scores[signal], before.scores[signal]) for c, before in pairs]
                row |= _told("calibrated", some, found)
            rows.append(row)
    return rows


def said_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each system: the percentage of the passages read that it repeated."""
    return [
        about | {"said": float(np.mean([cell.controls["said"] for cell in found]))}
        for about, found in all_found(config, folder)
    ]


def _told(attack: str, scores: list[np.ndarray], found) -> dict[str, float]:
    made = [
        Attack(some, cell.scores["member"] > 0, cell.clusters)
        for some, cell in zip(scores, found, strict=True)
    ]
    told = {}
    for name, statistic, unit in (("auc", auc, 1.0), ("tpr", tpr_at_fpr, 100.0)):
        ends = zip(("", "_low", "_high"), estimate(statistic, made), strict=True)
        told |= {f"{attack}_{name}{end}": unit * value for end, value in ends}
    return told


def report(config, folder: pathlib.Path) -> Report:
    """Returns the `Report` on all finished cells."""
    rows, said = rows_of(config, folder), said_rows(config, folder)
    who = [tables.words(name, name) for name in ("strategy", "regime")]
    who.append(tables.number("seeds", "seeds", 0))
    columns = (
        *who,
        tables.Column("loss of", lambda row: SIGNALS[row["signal"]], "left"),
        tables.number("members", "members", 0),
        tables.number("others", "others", 0),
        tables.interval("AUC, loss [95% CI]", "loss_auc", 2),
        tables.interval("AUC, against untuned [95% CI]", "calibrated_auc", 2),
        tables.interval("TPR at 1% FPR, against untuned", "calibrated_tpr"),
    )
    return Report(
        folder.name,
        f"What tuned systems of {config.of} give away.",
        [
            Section(
                "Membership of training questions",
                "membership",
                "How well a loss separates training questions (members) from others: AUC with 95% "
                "intervals over seeds and topics, 0.5 is guessing. The untuned system shows how much "
                "members and others differ in themselves; the attack 'against untuned' scores the "
                "difference from its loss. TPR: percent of the members that are found where 1% of the "
                "others are taken for members.",
                tables.Table(columns, rows),
            ),
            Section(
                "Passages repeated",
                "repeated",
                f"Percentage of the passages read for {config.prompted} test questions of which the "
                f"system wrote {config.said_words} consecutive words when prompts asked to repeat them "
                f"({SAID} tokens).",
                tables.Table((*who, tables.number("passages repeated, %", "said")), said),
            ),
        ],
        {"membership.csv": rows, "repeated.csv": said},
    )


def told(cell: cells.Cell) -> str:
    """Returns a line with the AUC of each loss."""
    member = cell.scores["member"] > 0
    some = {name: by_loss(cell.scores[name]) for name in SIGNALS if name in cell.scores}
    return "  ".join(f"{name} {auc(x[member], x[~member]):.2f}" for name, x in some.items())


EXPERIMENT = Experiment(
    name="leakage",
    free=("seeds", "split_seeds", "strategies", "regimes"),
    lab=lab,
    points=lambda lab: every_point(lab.asking),
    compute=compute,
    told=told,
    report=report,
)
