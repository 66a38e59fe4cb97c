"""Leakage of training and serving: quality and the success of attacks, for each defence.

    python -m experiments privacy

Results go to runs/<name>/: privacy.csv, table.md, report.html, figures. A finished cell (variant,
seeds) is not computed again.
"""

import pathlib

import numpy as np

from experiments.lab import Lab
from experiments.loading import check_replicates, check_scores, load_data, replicates, require_some
from experiments.privacy_lab import OBJECTIVE, Trainer, crowd
from experiments.reporting import cells, comparison, privacy_figures, tables
from experiments.reporting.page import Report, Section
from experiments.run import Experiment, Point, finished
from fedrag_jax.clock import Clock
from fedrag_jax.data.examples import clusters, ids_of, require_golds
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.evaluator import evaluate, rank_scores, ranking
from fedrag_jax.evaluation.leakage import extraction, inversion, membership, users
from fedrag_jax.evaluation.leakage.roc import Attack, Statistic, auc, estimate, tpr_at_fpr
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.tracking.ledger import Cost

REGIME = "federated"
VARIANT = ("algorithm", "options", "rounds", "local_steps", "by_heart")
ATTACKS = {  # on training questions: names of their scores in a cell, and titles
    "loss": "loss",
    "calibrated": "loss against the untrained model",
    "ratio": "likelihood ratio",
}


def lab(config, folder: pathlib.Path) -> Lab:
    """Returns the lab with the data and models of the config.

    Raises:
      ConfigError: an unknown variant setting, algorithm or option; an odd number of shadow models; a δ
        that is not below 1 / clients; clients with too few questions.
      DataError: test questions without gold passages.
    """
    check_replicates(config)
    check_scores(config)
    if config.strategy not in OBJECTIVE:
        raise ConfigError(f"config.strategy: choose among {[*OBJECTIVE]}, got {config.strategy!r}")
    require_some(config, "variants")
    if config.shadows % 2 or config.shadows == 2 or config.shadows < 0:
        raise ConfigError(
            f"config.shadows must be 0 or an even number of at least 4, got {config.shadows}: shadow "
            "models train on halves of the clients and their complements; two must lack each question"
        )
    training = config.federated.clients // 2
    if not 1 <= config.victims <= training:
        raise ConfigError(f"config.victims must be between 1 and {training}, got {config.victims}")
    for name, how in config.variants.items():
        where, options = f"config.variants.{name}", dict(how.get("options", {}))
        if unknown := {*how} - {*VARIANT}:
            raise ConfigError(f"{where} has {sorted(unknown)}; a variant may have {VARIANT}")
        if options.get("epsilon"):
            options["calibrate_for"] = how.get("rounds", config.training.rounds)
        by_name.check(how.get("algorithm", "fedavg"), options, where)
        if options.get("delta", 0) >= 1 / training:
            raise ConfigError(
                f"{where}: delta {options['delta']} is not below 1/{training}, of clients that train"
            )
    found = Lab(config, load_data(config), folder)
    asked = [found.dataset.test[i] for i in asked_of_store(found)]
    require_golds(asked, "attacks on a store need one; give positive_ids, or lower config.asked")
    for _, split in replicates(config):
        crowd(config, found.dataset, split)
    return found


def points(lab: Lab) -> list[Point]:
    """Returns all cells, by seed and variant."""
    return [
        Point(name, REGIME, *pair)
        for pair in replicates(lab.config)
        for name in lab.config.variants
    ]


def compute(lab: Lab, point: Point) -> cells.Cell:
    """Trains a variant and its shadow models, tests the variant and attacks it.

    Scores are first those of the test questions, then those of all clients' questions.
    """
    clock, trainer = Clock(), Trainer.of(lab, point.name, point.seed, point.split)
    start, controls = lab.system(point.seed), {}
    attacked, *shadows = [start] * len(trainer.crowd.trains)
    if trainer.rounds:
        fitted = trainer.trained()
        attacked, *shadows = [start.replace(**one.trainable) for one in fitted]
        last = fitted[0].history[-1]
        controls |= {"epsilon": last["epsilon"]} if "epsilon" in last else {}
    of_test = quality(lab, attacked) | store_attack_scores(lab, attacked)
    of_clients = membership_scores(trainer, start, attacked, shadows)
    if trainer.rounds:
        of_clients |= update_attack_scores(trainer)
    for known in (of_test, of_clients):
        controls |= {name: float(known.pop(name)) for name in [*known] if not np.ndim(known[name])}
    test, asked = lab.dataset.test, trainer.crowd.questions
    scores = {n: np.append(x, np.full(len(asked), np.nan)) for n, x in of_test.items()}
    scores |= {n: np.append(np.full(len(test), np.nan), x) for n, x in of_clients.items()}
    golds = [e.positive_ids for e in (*test, *lab.dataset.train)]
    about = clusters(golds, lab.dataset.passages)
    lap = clock.lap()
    cost = Cost(seconds=lap.others + lap.searching, compile_seconds=lap.compiling)
    where = point.name, point.regime, point.seed, point.split
    return cells.Cell(*where, scores, controls, [], cost, {}, about)


def quality(lab: Lab, system) -> dict[str, np.ndarray]:
    """Returns scores of the test questions: rankings, and answers if the primary metric needs them."""
    test = lab.dataset.test
    if lab.config.primary_metric in ("em", "f1"):
        return evaluate(system, test, mode=lab.config.mode)
    rows, _ = ranking(system.retriever, test)
    return rank_scores(system.retriever, test, rows)


def asked_of_store(lab: Lab) -> np.ndarray:
    """Returns the rows of the test questions that attacks on a store ask, in random order."""
    count = min(lab.config.asked, len(lab.dataset.test))
    return stream(0, "questions of a store").permutation(len(lab.dataset.test))[:count]


def store_attack_scores(lab: Lab, system) -> dict[str, np.ndarray]:
    """Returns the scores of attacks on a served system that holds half of the passages.

    `passage_f1` is F1 of the answers, `passage_there` whether the question is about the half that is
    held, and `said` the share of the passages read that prompts made the system repeat.
    """
    config, passages, test = lab.config, lab.dataset.passages, lab.dataset.test
    rows = asked_of_store(lab)
    asked = [test[i] for i in rows]
    held = stream(0, "passages of a store").random(len(passages)) < 0.5
    row = {identifier: i for i, identifier in enumerate(ids_of(passages))}
    found = {name: np.full(len(test), np.nan) for name in ("f1", "there")}
    found["f1"][rows] = extraction.answered_from(system, asked, held)["f1"]
    found["there"][rows] = held[[row[e.positive_ids[0]] for e in asked]]
    about = [e.question for e in asked[: len(asked) // 3]]
    said = extraction.repeated(system, about, config.said_words, max_new_tokens=48)
    return {"passage_f1": found["f1"], "passage_there": found["there"], "said": said}


def membership_scores(trainer: Trainer, start, attacked, shadows) -> dict[str, np.ndarray]:
    """Returns membership scores [N] of all clients' questions, with the clients that hold them."""
    who, losses = trainer.crowd, trainer.losses
    trained_on = who.trained_on()
    nll, before = losses(attacked), losses(start)
    found = {
        "loss": membership.by_loss(nll),
        "calibrated": membership.calibrated(nll, before),
        "user": who.user.astype(float),
        "fresh": who.fresh.astype(float),
        "took_part": who.trains[0, who.user].astype(float),
    }
    if shadows:
        known = np.stack([losses(one) for one in shadows])
        found["ratio"] = membership.likelihood_ratio(nll, known, trained_on[1:])
    return found


def update_attack_scores(trainer: Trainer) -> dict[str, np.ndarray]:
    """Returns the scores of attacks on the updates of some clients.

    `cosine_v` [N] is the score of each question against the update of client v, and `read_v` whether
    the client read the question. `words` is the share of the client's words found in its update, and
    `usual_words` the share found by guessing frequent words.
    """
    config, who, asked = trainer.lab.config, trainer.crowd, trainer.dataset.train
    victims = np.flatnonzero(who.trains[0])[: config.victims]
    one_by_one, words, usual, found = trainer.one_by_one(), [], [], {}
    for v, (victim, (read, fitted)) in enumerate(zip(victims, trainer.sent(victims), strict=True)):
        update = inversion.moved(fitted.trainable, trainer.task.trainable)
        others = np.flatnonzero(who.user != victim)
        others = stream(v, "candidates").choice(others, config.candidates, replace=False)
        among = np.concatenate([read, others])
        for name in (f"cosine_{v}", f"read_{v}"):
            found[name] = np.full(len(asked), np.nan)
        some = [asked[i] for i in among]
        found[f"cosine_{v}"][among] = inversion.matched(
            one_by_one, trainer.task.trainable, some, update
        )
        found[f"read_{v}"][among] = np.arange(len(among)) < len(read)
        if "query" in update:
            table = trainer.task.table([asked[i] for i in read])
            everybody = trainer.task.table([asked[i] for i in others])
            moved = inversion.touched(update["query"]["embed"]["embedding"])
            there, often = (_counts(of, len(moved)) for of in (table, everybody))
            words.append(inversion.r_precision(moved, there > 0))
            usual.append(inversion.r_precision(often, there > 0))
    if words:
        found |= {"words": np.mean(words), "words_low": min(words), "words_high": max(words)}
        found |= {"usual_words": np.mean(usual)}
    return found


def _counts(table, vocabulary: int) -> np.ndarray:
    """Returns the count of each token [V] in the questions of a table."""
    mask = np.asarray(table["question_mask"], bool)
    return np.bincount(np.asarray(table["question_tokens"])[mask], minlength=vocabulary)


def attacks_on(found: list[cells.Cell], name: str) -> list[Attack]:
    """Returns the attacks of a column: one or more for each seed."""
    made = []
    for cell in found:
        scores = {n: x[~np.isnan(cell.scores["user"])] for n, x in cell.scores.items()}
        part, fresh = scores["took_part"] > 0, scores["fresh"] > 0
        if name in ATTACKS and name in scores:
            user = scores["user"][~fresh].astype(int)
            made.append(Attack(scores[name][~fresh], part[~fresh], user))
        elif name in ("clients", "clients_fresh"):
            kept = fresh if name == "clients_fresh" else ~fresh
            names, means = users.took_part(scores["calibrated"][kept], scores["user"][kept])
            there = np.isin(names, scores["user"][part])
            made.append(Attack(means, there, names.astype(int)))
        elif name == "update":
            for v in range(sum(n.startswith("cosine_") for n in scores)):
                kept = ~np.isnan(scores[f"cosine_{v}"])
                read = scores[f"read_{v}"][kept] > 0
                made.append(Attack(scores[f"cosine_{v}"][kept], read, np.arange(kept.sum())))
        elif name == "passages":
            asked = ~np.isnan(cell.scores["passage_f1"])
            there = cell.scores["passage_there"][asked] > 0
            about = cell.clusters[asked]
            made.append(Attack(cell.scores["passage_f1"][asked], there, about))
    return made


MEASURED = (*ATTACKS, "clients", "clients_fresh", "update", "passages")


def rows_of(config, folder: pathlib.Path) -> list[dict]:
    """Returns a row for each variant: quality, AUC of attacks, and TPR at 1% FPR."""
    rows = []
    for name in config.variants:
        if not (found := finished(config, folder, name, REGIME)):
            continue
        row = {"variant": name, "seeds": len(found)}
        known = {n: np.mean([c.controls[n] for c in found]) for n in found[0].controls}
        row |= {n: float(x) for n, x in known.items() if np.isfinite(x)}
        for metric in comparison.METRICS:
            if metric in found[0].scores:
                row |= comparison.estimate(found, metric)
        row |= falls(found)
        for attack in MEASURED:
            if made := attacks_on(found, attack):
                row |= _told(f"{attack}_auc", measured(attack, auc, made))
                if attack in ATTACKS:
                    row |= _told(f"{attack}_tpr", measured(attack, tpr_at_fpr, made), 100)
        row["seconds"] = float(np.mean([c.cost.seconds + c.cost.compile_seconds for c in found]))
        rows.append(row)
    return rows


def measured(attack: str, statistic: Statistic, made: list[Attack]) -> tuple[float, float, float]:
    """Returns the mean over seeds of a statistic and its interval; all seeds ask a store the same."""
    return estimate(statistic, made, same_questions=attack == "passages")


def falls(found: list[cells.Cell]) -> dict[str, float]:
    """Returns by how many nats training lowered the loss of questions: of those trained on, and of
    those of clients that did not train. Means over questions and seeds."""
    fell = {"fall_trained": [], "fall_others": []}
    for cell in found:
        trained = (cell.scores["took_part"] > 0) & (cell.scores["fresh"] == 0)
        others = cell.scores["took_part"] == 0
        for name, some in zip(fell, (trained, others), strict=True):
            fell[name].append(np.mean(cell.scores["calibrated"][some]))
    return {name: float(np.mean(values)) for name, values in fell.items()}


def _told(name: str, found: tuple[float, float, float], unit: float = 1.0) -> dict[str, float]:
    return {f"{name}{end}": unit * x for end, x in zip(("", "_low", "_high"), found, strict=True)}


def report(config, folder: pathlib.Path) -> Report:
    """Returns the `Report` on all finished cells."""
    rows, primary = rows_of(config, folder), config.primary_metric
    title = comparison.METRICS[primary]
    t, f = config.training, config.federated
    variant, seeds = tables.words("variant", "variant"), tables.number("seeds", "seeds", 0)
    questions = (
        variant,
        tables.number("ε", "epsilon", 1),
        seeds,
        tables.interval(f"{title} [95% CI]", primary),
        tables.number("fall of the loss, trained on", "fall_trained", 2),
        tables.number("others", "fall_others", 2),
        *(tables.interval(f"AUC, {words}", f"{name}_auc", 2) for name, words in ATTACKS.items()),
        tables.interval("TPR at 1% FPR, likelihood ratio", "ratio_tpr"),
    )
    others = (
        variant,
        tables.interval("clients, by trained questions", "clients_auc", 2),
        tables.interval("clients, by other questions", "clients_fresh_auc", 2),
        tables.interval("questions of an update", "update_auc", 2),
        tables.interval("words of an update", "words", 2),
        tables.number("frequent words", "usual_words", 2),
        tables.interval("passages of a store", "passages_auc", 2),
        tables.number("passages repeated, %", "said", 1, 0.01),
        tables.number("seconds, with shadow models and attacks", "seconds", 0),
    )
    return Report(
        folder.name,
        f"What training `{config.strategy}` reveals: {f.clients} clients of {config.data.name}, half "
        f"of which train, {t.rounds} rounds of {t.local_steps} local steps unless a variant differs.",
        [
            Section(
                "Figure",
                "privacy",
                "Quality and the success of attacks over ε. Variants without a privacy claim are at "
                "the right. 0.5 is guessing.",
                figure=privacy_figures.over_epsilon(rows, primary),
            ),
            Section(
                "Which questions were trained on",
                "privacy",
                "AUC with 95% intervals over clients and seeds. Members are the questions of the "
                "clients that trained; the others belong to the other half of the clients. The fall of "
                "the loss is in nats against the untrained model. "
                f"{config.shadows} shadow models.",
                tables.Table(questions, rows),
            ),
            Section(
                "Clients, updates, passages",
                "others",
                "Clients: AUC for separating clients that trained from others, by trained questions "
                "and by questions that no client trains on. Questions of an update: AUC for separating "
                "the questions that a client read in the first round from others by its update, as "
                "seen by a party that knows all other updates. Words of an update: share of the "
                "client's words among as many rows of the embedding table with the largest change "
                "(interval: lowest to highest client); frequent words: the same for as many frequent "
                "words. Passages of a store: AUC for recognising held passages by F1 of the answers. "
                "Passages repeated: share of the passages read from which the system wrote "
                f"{config.said_words} consecutive words when prompts asked it to.",
                tables.Table(others, rows),
            ),
        ],
        {"privacy.csv": rows},
    )


def summary(cell: cells.Cell) -> str:
    """Returns the line that is printed for a finished cell."""
    parts = [f"{attack} {estimate(auc, made, resamples=1)[0]:.2f}" for attack in MEASURED
             if (made := attacks_on([cell], attack))]  # fmt: skip
    judged = [m for m in comparison.METRICS if m in cell.scores]
    known = [f"{comparison.METRICS[m]} {100 * np.nanmean(cell.scores[m]):.1f}" for m in judged]
    return "  ".join([*known, *parts])


EXPERIMENT = Experiment(
    name="privacy",
    free=("seeds", "split_seeds"),
    defined=("variants",),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=report,
)
