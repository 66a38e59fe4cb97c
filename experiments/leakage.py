"""What the tuned systems of a finished comparison give away: training questions, and passages.

    python -m experiments leakage --config.of=runs/real

Nothing is trained: systems are read from the folder of the comparison. Losses of questions that were
trained on are compared with losses of others, and prompts ask for the passages that a system reads.
Comparisons of other training questions (`config.shadows`) serve as shadow models of a likelihood ratio.
Results go to runs/<name>/: membership.csv, repeated.csv, table.md, report.html. A cell (strategy,
regime, seeds) that is finished is not computed again.
"""

import functools
import itertools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from experiments.finished_lab import (
    FinishedLab,
    require_finished,
    require_run,
    tested,
    untuned_of_other_seeds,
)
from experiments.launch import kept_config
from experiments.loading import check_replicates, replicates
from experiments.reporting import cells, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import Example, sample
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import answer_nll
from fedrag_jax.evaluation.leakage import extraction
from fedrag_jax.evaluation.leakage.membership import by_loss, calibrated, likelihood_ratio
from fedrag_jax.evaluation.leakage.roc import Attack, auc, estimate, tpr_at_fpr
from fedrag_jax.evaluation.leakage.signals import ranking_nll
from fedrag_jax.tracking.ledger import Cost

SIGNALS = {
    "read": "answer, with passages",
    "closed": "answer, without passages",
    "ranked": "rank of the gold passage",
}
SAID = 64  # tokens that a prompt for passages is answered with
SHADOWS = "shadows"  # folder of the cells of shadow models, by the names of their comparisons
# Settings in which the comparison of a shadow model may differ, and those of them in its data.
FREE = (
    "name", "seeds", "split_seeds", "strategies", "regimes", "limits", "search_seconds",
    "equivalence_margin", "wandb",
)  # fmt: skip
FREE_DATA = ("sample_seed", "test_questions", "own_questions", "control_questions")


class Suspects(FinishedLab):
    """Tuned systems, and the questions that an attacker asks about.

    Attributes:
      questions: training questions and others.
      shadow: `shadow(name)`, the lab of a shadow model's comparison; the last is kept.
      group: int [N], the topic of each; without topics, the question.
    """

    def __init__(self, config, of: pathlib.Path, folder: pathlib.Path):
        super().__init__(of)
        self.asking, self.results = config, folder
        others = [e for e, own in zip(self.asked, self.of_own, strict=True) if own]
        members, others = (
            sample(some, config.questions, 0) for some in (self.dataset.train, others)
        )
        self.questions: list[Example] = [*members, *others]
        self.shadow = functools.lru_cache(maxsize=1)(self._shadow)
        names = [e.topic or e.id for e in self.questions]
        self.group = np.unique(names, return_inverse=True)[1]

    def _shadow(self, name: str) -> FinishedLab:
        (of,) = (of for of in map(pathlib.Path, self.asking.shadows) if of.name == name)
        return FinishedLab(of)


def every_point(config) -> list[Point]:
    """Returns all cells of the attacked systems, by seeds and system."""
    return [
        Point(strategy, regime, *pair)
        for pair in replicates(config)
        for strategy, regime in tested(config.strategies, config.regimes)
    ]


def shadow_points(config, of: pathlib.Path) -> list[Point]:
    """Returns the cells of a comparison's shadow models: its own regimes, and its first pair of seeds.

    Raises:
      ConfigError: the folder holds no run.
    """
    require_run(of, "config.shadows")
    there = ConfigDict(kept_config(of / "config.json"))
    pair = replicates(there)[0]
    return [
        Point(strategy, regime, *pair, folder=f"{SHADOWS}/{of.name}")
        for strategy, regime in tested(config.strategies, config.regimes)
        if strategy != "none" and strategy in there.strategies and regime in there.regimes
    ]


def check_shadows(config) -> None:
    """Checks that the shadow models were trained as the attacked ones, on other questions.

    Raises:
      ConfigError: a single one, a folder without the cells, another setting, the same questions.
    """
    folders = [pathlib.Path(of) for of in config.shadows]
    names = {of.name for of in folders}
    if len(names) == 1 or len(names) < len(folders):
        raise ConfigError(
            f"config.shadows is {[*map(str, folders)]}; a likelihood ratio needs the spread of at "
            "least two shadow models, from folders of different names"
        )
    attacked = kept_config(pathlib.Path(config.of) / "config.json")
    for of in folders:
        require_finished(of, shadow_points(config, of), "config.shadows")
        there = kept_config(of / "config.json")
        different = [name for name in there if name not in (*FREE, "data")]
        different = [name for name in different if there[name] != attacked.get(name)]
        data = [name for name in there["data"] if name not in FREE_DATA]
        different += [f"data.{n}" for n in data if there["data"][n] != attacked["data"].get(n)]
        if different:
            raise ConfigError(
                f"config.shadows: {of} differs from {config.of} in config.{different[0]}; a shadow "
                "model may differ only in its questions (data.sample_seed)"
            )
        if there["data"]["sample_seed"] == attacked["data"]["sample_seed"]:
            raise ConfigError(
                f"config.shadows: {of} was trained on the questions of {config.of}; train it with "
                "another config.data.sample_seed"
            )


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
    check_shadows(config)
    return Suspects(config, pathlib.Path(config.of), folder)


def points(lab: Suspects) -> list[Point]:
    """Returns all cells: the attacked systems, then the shadow models."""
    shadows = (shadow_points(lab.asking, pathlib.Path(of)) for of in lab.asking.shadows)
    return [*every_point(lab.asking), *itertools.chain.from_iterable(shadows)]


def compute(lab: Suspects, point: Point) -> cells.Cell:
    """Computes the losses of all questions under one system, and asks an attacked one for its
    passages."""
    if known := untuned_of_other_seeds(lab.asking, lab.results, point):
        return known
    where, asked = (point.name, point.regime, point.seed, point.split), lab.questions
    of = lab.shadow(pathlib.Path(point.folder).name) if point.folder else lab
    trained_on = {e.id for e in of.dataset.train}
    system, clock = of.tuned(*where), Clock()
    rows, _ = system.retriever.search([e.question for e in asked], system.top_k)
    scores = {
        "read": answer_nll(system, asked, rows),
        "closed": answer_nll(system, asked, np.zeros((len(asked), 0), int)),
        "member": np.array([float(e.id in trained_on) for e in asked]),
    }
    if all(e.positive_ids for e in asked):
        scores["ranked"] = ranking_nll(system.retriever, asked, system.score_scale)
    controls = {} if point.folder else {"said": 100 * repeated_share(lab, system)}
    cost = Cost.of_evaluation(clock.lap())
    return cells.Cell(*where, scores, controls, [], cost, {}, lab.group)


def repeated_share(lab: Suspects, system) -> float:
    """Returns the share of the passages read that prompts make a system repeat."""
    about = [e.question for e in sample(lab.dataset.test, lab.asking.prompted, 0)]
    return extraction.repeated(system, about, lab.asking.said_words, max_new_tokens=SAID)


def all_found(config, folder: pathlib.Path) -> list[tuple[dict, list[cells.Cell]]]:
    """Returns the finished cells of each system, with its `strategy`, `regime` and `seeds`."""
    systems = []
    for strategy, regime in tested(config.strategies, config.regimes):
        if found := finished(config, folder, strategy, regime):
            where = "" if strategy == "none" else regime
            systems.append(({"strategy": strategy, "regime": where, "seeds": len(found)}, found))
    return systems


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each system and signal.

    AUC and TPR are by the loss alone, by the difference from the loss of the untuned system, and by the
    likelihood ratio if there are shadow models.
    """
    rows, systems = [], all_found(config, folder)
    untuned = (found for about, found in systems if about["strategy"] == "none")
    start = {(cell.seed, cell.split): cell for cell in next(untuned, ())}
    for about, found in systems:
        member = found[0].scores["member"] > 0
        about = about | {"members": int(member.sum()), "others": int((~member).sum())}
        shadows = [] if about["strategy"] == "none" else shadows_of(config, folder, found[0])
        for signal in [name for name in SIGNALS if name in found[0].scores]:
            row = about | {"signal": signal}
            row |= _told("loss", [by_loss(cell.scores[signal]) for cell in found], found)
            pairs = [(cell, start.get((cell.seed, cell.split))) for cell in found]
            if about["strategy"] != "none" and all(before for _, before in pairs):
                some = [calibrated(c.scores[signal], before.scores[signal]) for c, before in pairs]
                row |= _told("calibrated", some, found)
            if len(shadows) > 1:
                some = [by_shadows(cell, shadows, signal) for cell in found]
                row |= _told("likelihood", some, found)
            rows.append(row)
    return rows


def shadows_of(config, folder: pathlib.Path, cell: cells.Cell) -> list[cells.Cell]:
    """Returns the finished cells of the shadow models of a system."""
    every = (p for of in config.shadows for p in shadow_points(config, pathlib.Path(of)))
    of_system = (p for p in every if (p.name, p.regime) == (cell.strategy, cell.regime))
    return [found for point in of_system if (found := point.finished(folder))]


def by_shadows(cell: cells.Cell, shadows: list[cells.Cell], signal: str) -> np.ndarray:
    """Returns the likelihood ratio [N]; NaN for questions that all shadow models were trained on."""
    trained_on = np.array([shadow.scores["member"] > 0 for shadow in shadows])
    losses = np.array([shadow.scores[signal] for shadow in shadows])
    scores, known = np.full(len(cell.clusters), np.nan), ~trained_on.all(0)
    scores[known] = likelihood_ratio(
        cell.scores[signal][known], losses[:, known], trained_on[:, known]
    )
    return scores


def said_rows(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each system: the percentage of the passages read that it repeated."""
    return [
        about | {"said": float(np.mean([cell.controls["said"] for cell in found]))}
        for about, found in all_found(config, folder)
    ]


def _told(attack: str, scores: list[np.ndarray], found) -> dict[str, float]:
    made = []
    for some, cell in zip(scores, found, strict=True):
        known = ~np.isnan(some)
        made.append(Attack(some[known], cell.scores["member"][known] > 0, cell.clusters[known]))
    told = {}
    for name, statistic, unit in (("auc", auc, 1.0), ("tpr", tpr_at_fpr, 100.0)):
        ends = zip(
            ("", "_low", "_high"), estimate(statistic, made, same_questions=True), strict=True
        )
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
        *(
            (
                tables.interval("AUC, likelihood ratio [95% CI]", "likelihood_auc", 2),
                tables.interval("TPR at 1% FPR, likelihood ratio", "likelihood_tpr"),
            )
            if config.shadows
            else ()
        ),
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
                "Prompts ask the system to repeat the passages that it read for "
                f"{config.prompted} test questions: the percentage of these passages from which it "
                f"wrote {config.said_words} consecutive words ({SAID} tokens at most).",
                tables.Table((*who, tables.number("passages repeated, %", "said")), said),
            ),
        ],
        {"membership.csv": rows, "repeated.csv": said},
    )


def summary(cell: cells.Cell) -> str:
    """Returns a line with the AUC of each loss, or of a shadow model with its mean losses."""
    member = cell.scores["member"] > 0
    if not cell.controls:
        means = {name: cell.scores[name].mean() for name in SIGNALS if name in cell.scores}
        return "  ".join(f"{name} {mean:.2f} nats" for name, mean in means.items())
    some = {name: by_loss(cell.scores[name]) for name in SIGNALS if name in cell.scores}
    return "  ".join(f"{name} {auc(x[member], x[~member]):.2f}" for name, x in some.items())


EXPERIMENT = Experiment(
    name="leakage",
    free=("seeds", "split_seeds", "strategies", "regimes", "shadows"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
