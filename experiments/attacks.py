"""Hostile clients: the effect of each attack on strategies under each aggregation rule.

    python -m experiments attacks

Results go to runs/<name>/: attacks.csv, table.md, report.html. A finished cell (attack, rule, strategy,
seeds) is not computed again.
"""

import dataclasses
import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.compare_strategies import summary
from experiments.lab import METRICS, Lab, compute_cell
from experiments.loading import (
    check_replicates,
    check_scores,
    load_data,
    replicates,
    require_federated,
    require_known,
    require_some,
)
from experiments.reporting import cells, comparison, differences, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.data.corpora import following
from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.data.partition import partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.metrics import exact_match, percent
from fedrag_jax.evaluation.rankings import answer_recall_at_k
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.federated.attacks import (
    FORGED,
    backdoored,
    forged_labels,
    forgeries,
    labels_flipped,
    poisoned,
    under_trigger,
)
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import Budget

REGIME = "federated"
HOLDS = ("", "labels", "trigger", "passages")


class Wanted(NamedTuple):
    """The goal of the trigger: an answer, and the passage that contains it."""

    answer: str
    passage: str


class Attacks(Lab):
    """A lab for every attack, rule and split, with folders of their own.

    Attributes:
      hostile: poisoned data sets and the systems over them, by kind of poison and split.
    """

    def __init__(self, config, folder: pathlib.Path):
        super().__init__(config, load_data(config), folder)
        self.hostile: dict[tuple[str, int], tuple[Dataset, dict]] = {}

    def at(self, attack: str, rule: str, split: int) -> Lab:
        """Returns the lab for an attack and a rule; "" is no rule.

        Raises:
          ConfigError: an attacker that does not exist, or no honest client.
          DataError: the attackers' passages cannot be forged.
        """
        other = self.like(with_rule(self.config, attack, rule), self.folder / attack / rule)
        if how := self.config.known_attacks[attack].holds:
            if (how, split) not in self.hostile:
                # The poisoned data may have wider prompts and another corpus.
                self.hostile[how, split] = self.poisoned(how, split), {}
            other.dataset, other.systems = self.hostile[how, split]
        return other

    def poisoned(self, how: str, split: int) -> Dataset:
        """Returns the data set after the attackers poisoned their part; `how` is one of `HOLDS`."""
        clients, passages = self.clients(REGIME, split), [*self.dataset.passages]
        if how == "labels":
            poison = labels_flipped(split)
        elif how == "trigger":
            trigger = self.config.trigger
            poison = backdoored(trigger.text, *self.wanted(split), trigger.questions)
        else:
            held = partition(passages, following(clients), split)
            theirs = [p for client in self.config.attackers for p in held.of(client)]
            forged = forgeries(theirs)
            passages += forged
            poison = forged_labels({p.id for p in forged})
        train = poisoned(clients, self.config.attackers, poison).examples
        return dataclasses.replace(self.dataset, train=[*train], passages=passages)

    def wanted(self, split: int) -> Wanted:
        """Returns the gold passage of the attackers' first question, and its answer."""
        first = self.clients(REGIME, split).of(min(self.config.attackers))[0]
        return Wanted(first.answer, first.positive_ids[0])


def with_rule(config, attack: str, rule: str):
    """Returns the config of a comparison with this attack and this aggregation rule."""
    config = config.copy_and_resolve_references()
    if not rule:
        return config
    options = config.known_rules[rule].to_dict()
    with config.unlocked():
        config.federated.algorithm = options.pop("algorithm")
        if sends := config.known_attacks[attack].sends:
            options |= {"attack": sends, "attackers": tuple(config.attackers)}
        config.federated.algorithm_options = options
    return config


def lab(config, folder: pathlib.Path) -> Attacks:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: no attacks, rules, strategies or attackers; an unknown attack, algorithm or mode;
        fewer clients than a rule needs; a missing learning rate; a regime other than the federated one.
      DataError: a training question without a gold passage.
    """
    check_replicates(config)
    check_scores(config, rankings_alone=True)
    require_some(config, "attacks", "rules", "strategies", "attackers")
    require_federated(config, "other regimes do not average")
    for name in ("attacks", "rules"):
        known = config[f"known_{name}"]
        require_known(f"config.{name}", config[name], known, f", or add it to config.known_{name}")
    for attack in config.attacks:
        if (holds := config.known_attacks[attack].holds) not in HOLDS:
            raise ConfigError(
                f"config.known_attacks.{attack}.holds: unknown {holds!r}; choose among {HOLDS}"
            )
    for attack, rule in itertools.product(config.attacks, config.rules):
        federated = with_rule(config, attack, rule).federated
        options = federated.algorithm_options.to_dict()
        where = f"config.known_rules.{rule} under {attack}"
        by_name.check(federated.algorithm, options, where)
        require_clients(config, federated.algorithm, options, where)
    found = Attacks(config, folder)
    for (_, split), attack in itertools.product(replicates(config), config.attacks):
        found.at(attack, "", split)
    for row in map(named, config.strategies):
        for part in row.rates:
            found.rate(REGIME, row, part)
    return found


def require_clients(config, algorithm: str, options: dict[str, Any], where: str) -> None:
    """Raises ConfigError if a robust rule needs more clients than a round has."""
    if algorithm not in by_name.ROBUST:
        return
    f, t = config.federated, config.training
    budget = Budget(t.rounds, t.local_steps, f.clients, participation=f.participation)
    drawn = uniform(budget.schedule(REGIME).drawn)
    make = by_name.Named(algorithm, options).averaging(None, {})
    try:
        make(sampling=drawn).init({}, lambda trainable: (), f.clients)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def points(lab: Attacks) -> list[Point]:
    """Returns the untuned system for each corpus, then seed by seed, rule by rule, attack by attack."""
    config, pairs = lab.config, replicates(lab.config)
    corpora = [a for a in config.attacks if config.known_attacks[a].holds == "passages"]
    untuned = [
        Point("none", REGIME, *pairs[0], folder=attack)
        for attack in dict.fromkeys([config.attacks[0], *corpora])
        if "none" in config.strategies
    ]
    return untuned + [
        Point(strategy, REGIME, *pair, folder=f"{attack}/{rule}")
        for pair, strategy, rule, attack in itertools.product(
            pairs, config.strategies, config.rules, config.attacks
        )
        if strategy != "none"
    ]


def compute(lab: Attacks, point: Point) -> cells.Cell:
    """Trains and tests a strategy while some clients attack; measures the success of the attack."""
    attack, _, rule = point.folder.partition("/")
    where, run = (point.regime, point.seed, point.split), lab.at(attack, rule, point.split)
    cell = compute_cell(run, point.name, *where, controls=False)
    system = run.system(point.seed)
    if point.name != "none":
        (system,), _ = run.tuned_systems(point.name, *where)  # reads the trained system of the cell
    return cell._replace(controls=successes(lab, run, system, point))


def successes(lab: Attacks, run: Lab, system, point: Point) -> dict[str, float]:
    """Returns the success of the attack in percent.

    `trigger` is measured under the first attack and under backdoors: the share of triggered questions
    with the attacker's answer or, if no generator is trained, with the attacker's passage among the
    first top-k. `forged` is measured if there are forgeries: the share of questions about forged
    passages that are answered wrongly, with words of a forgery.
    """
    found, attack = {}, point.folder.partition("/")[0]
    if attack == lab.config.attacks[0] or lab.config.known_attacks[attack].holds == "trigger":
        said_or_found = obeyed(lab, system, "adapters" in named(point.name).rates, point.split)
        found["trigger"] = percent(said_or_found)
    forged = {p.id: p.text for p in run.dataset.passages if p.id.startswith(FORGED)}
    about = [(e, text) for e in run.dataset.test if (text := told_by(forged, e))]
    if about:
        questions = [e.question for e, _ in about]
        rows, _ = system.retriever.search(questions, system.top_k)
        said = system.answer(questions, rows)
        found["forged"] = percent(
            [
                bool(answer_recall_at_k([[0]], [text], [[answer]], 1)[0])
                and not exact_match(answer, e.answers)
                for answer, (e, text) in zip(said, about, strict=True)
            ]
        )
    return found


def obeyed(lab: Attacks, system, answered: bool, split: int) -> np.ndarray:
    """Returns bool [Q]: whether the trigger reaches its goal, for each triggered test question."""
    text, (answer, passage) = lab.config.trigger.text, lab.wanted(split)
    asked = [e for e in lab.dataset.test if passage not in e.positive_ids]
    asked = [under_trigger(e, text, answer, passage) for e in asked]
    rows, _ = system.retriever.search([e.question for e in asked], system.top_k)
    if not answered:
        wanted = [p.id for p in lab.dataset.passages].index(passage)
        return (rows == wanted).any(1)
    said = system.answer([e.question for e in asked], rows)
    return np.array([exact_match(text, e.answers) for text, e in zip(said, asked, strict=True)])


def told_by(forged: dict[str, str], example: Example) -> str:
    """Returns the texts of the forgeries of a question's gold passages; "" if there are none."""
    return " ".join(
        forged[name] for i in example.positive_ids if (name := f"{FORGED}{i}") in forged
    )


def rows_of(config, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns a row for each strategy, attack and rule.

    `<metric>_by_*` are differences from the same rule under the first attack; `<metric>_saves_*` are
    differences from the first rule under the same attack.
    """
    rows, usual = [], (config.attacks[0], config.rules[0])
    for attack in config.attacks:
        if untuned := finished(config, folder / attack, "none", REGIME):
            row = {"strategy": "none", "attack": attack, "rule": "", "seeds": len(untuned)}
            rows.append(row | scored(untuned))
    tuned = [strategy for strategy in config.strategies if strategy != "none"]
    for strategy, attack, rule in itertools.product(tuned, config.attacks, config.rules):

        def found_at(attack, rule, strategy=strategy):
            return finished(config, folder / attack / rule, strategy, REGIME)

        if not (found := found_at(attack, rule)):
            continue
        row = {"strategy": strategy, "attack": attack, "rule": rule, "seeds": len(found)}
        row |= scored(found) | comparison.costs_and_clients(found)
        for metric in METRICS:
            others = {"by": (usual[0], rule), "saves": (attack, usual[1])}
            for prefix, other in others.items():
                if other == (attack, rule) or not (cells := found_at(*other)):
                    continue
                names = f"{metric}_{prefix}_"
                row |= differences.paired_difference(found, cells, metric, prefix=names)
        rows.append(row)
    for metric, prefix in itertools.product(METRICS, ("by", "saves")):
        differences.adjust(rows, f"{metric}_{prefix}_")
    return rows


def scored(found: list[cells.Cell]) -> dict[str, Any]:
    """Returns estimates of all metrics, and means over seeds of the attacks' success."""
    row: dict[str, Any] = {}
    for metric in METRICS:
        row |= comparison.estimate(found, metric)
    return row | comparison.control_means(found)


def crossed(rows: list[dict], key: str, digits: int = 1) -> tables.Table:
    """Returns a table with a row for each rule and a column for each attack."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows if row["rule"]))
    lines: dict[tuple, dict] = {}
    for row in rows:
        line = lines.setdefault((row["strategy"], row["rule"]), {})
        line |= {"strategy": row["strategy"], "rule": row["rule"] or "untuned"}
        line |= {
            f"{row['attack']}{part}": row.get(f"{key}{part}")
            for part in ("", "_low", "_high", "_sd")
        }
    columns = (
        tables.words("strategy", "strategy"),
        tables.words("rule", "rule"),
        *(tables.interval(attack.replace("_", " "), attack, digits) for attack in attacks),
    )
    return tables.Table(columns, list(lines.values()))


def report(config, folder: pathlib.Path):
    """Returns the `Report` on all finished cells."""
    rows, primary = rows_of(config, folder), config.primary_metric
    title, t = comparison.METRICS, config.training
    who = tuple(tables.words(name, name) for name in ("strategy", "attack", "rule"))
    columns = (
        *who,
        tables.number("seeds", "seeds", 0),
        *(tables.interval(f"{title[metric]} [95% CI]", metric) for metric in METRICS),
        tables.difference("against no attack [95% CI]", f"{primary}_by_"),
        tables.p_value("p", f"{primary}_by_p_holm"),
        tables.difference("against the first rule [95% CI]", f"{primary}_saves_"),
        tables.p_value("p", f"{primary}_saves_p_holm"),
        tables.number("trigger succeeds", "trigger"),
        tables.number("forgery believed", "forged"),
        tables.number("worst client", "client_em_worst"),
        tables.number("seconds", "seconds"),
    )
    return Report(
        folder.name,
        f"{len(config.attackers)} of {config.federated.clients} clients attack: {config.data.name}, "
        f"{t.rounds} rounds of {t.local_steps} local steps.",
        [
            Section(
                f"{title[primary]} by attack and rule",
                "by_attack",
                "Clean test questions, percent with 95% intervals over seeds and questions. With "
                "forged passages, the corpus contains them, but only the true passages count as gold.",
                crossed(rows, primary),
            ),
            Section(
                "All metrics",
                "attacks",
                f"Differences are of {title[primary]}, paired by question and seed; p values come from "
                "a permutation test over questions, Holm-adjusted over the table. Trigger succeeds: "
                "share of test questions with the trigger that get the attacker's answer or, if no "
                "generator is trained, the attacker's passage. Forgery believed: share of questions "
                "about forged passages that are answered wrongly, with words of a forgery.",
                tables.Table(columns, rows),
            ),
        ],
        {"attacks.csv": rows},
    )


EXPERIMENT = Experiment(
    name="attacks",
    free=("seeds", "split_seeds", "strategies", "attacks", "rules", "primary_metric"),
    defined=("known_attacks", "known_rules"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
