"""Label-free fine-tuning of a generator that cites: steps left out, controls, and silos.

    python -m experiments aloftrag

Results go to runs/<name>/: aloftrag.csv, contexts.csv, silos.csv, table.md, report.html. What was
asked about the texts and what became of it lies in label_free/, line by line. A cell (variant, regime,
seeds) that is finished is not computed again, and no request is repeated.
"""

import functools
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from experiments import aloftrag_report
from experiments.aloftrag_lab import BASE, METRICS, LabelFreeLab, endpoint
from experiments.curves import training_curves
from experiments.loading import check_replicates, replicates, require_known, require_some
from experiments.reporting import cells
from experiments.run import Experiment, Point
from fedrag_jax.clock import Clock
from fedrag_jax.data import datasets
from fedrag_jax.data.examples import Dataset
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.citing import contexts_of, evaluate_citing
from fedrag_jax.evaluation.judge import judged
from fedrag_jax.files import write_json
from fedrag_jax.label_free import pipeline
from fedrag_jax.objectives.citing import citing
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.tracking.ledger import Cost


class Variant(NamedTuple):
    """A variant of label-free fine-tuning.

    Attributes:
      generate: options of `pipeline.generate`.
      part: the trained part, "generator" or "retriever".
      shuffled: a control in which each question gets the citation of another.
      elsewhere: a control that trains on texts of a pretraining world.
    """

    generate: dict
    part: str = "generator"
    shuffled: bool = False
    elsewhere: bool = False


VARIANTS = {
    "all": Variant({"filter_questions": True}),
    "without_step_1": Variant({"filter_texts": False, "filter_questions": True}),
    "without_step_3": Variant({}),
    "random_negatives": Variant({"negatives": "random"}),
    "always_answerable": Variant({"unanswerable": 0.0}),
    "unanswerable": Variant({"unanswerable": 0.2}),
    "questions_2": Variant({"per_text": 2}),
    "questions_4": Variant({"per_text": 4}),
    "retriever": Variant({"filter_questions": True, "unanswerable": 0.0}, part="retriever"),
    "pretraining_world": Variant({}, elsewhere=True),
    "shuffled_citations": Variant({}, shuffled=True),
}


def task_of(variant: Variant, system, made, seed: int):
    """Returns the task of a variant."""
    examples = [e for some in made.values() for e in some.examples]
    contexts = {i: c for some in made.values() for i, c in some.contexts.items()}
    if variant.part == "retriever":
        dataset = Dataset("label-free", system.retriever.passages, examples, [], [])
        negatives = {i: np.delete(c.rows, np.array(c.cites) - 1) for i, c in contexts.items()}
        return multiple_negatives_ranking(system.retriever, dataset, negatives=negatives)
    if variant.shuffled:
        order = stream(seed, "shuffled citations").permutation(len(examples))
        others = [contexts[examples[i].id].cites for i in order]
        contexts = {
            e.id: contexts[e.id]._replace(cites=cites)
            for e, cites in zip(examples, others, strict=True)
        }
    return citing(
        system.decoder, system.generator.params, system.adapters, system.prompts, examples, contexts
    )


def compute(lab: LabelFreeLab, point: Point) -> cells.Cell:
    """Generates, trains and reads the contexts of the test questions."""
    name, regime, seed, split = point.name, point.regime, point.seed, point.split
    if name == BASE:  # is the same with all seeds, whose adapters are all zero
        known = (cells.load(lab.folder, name, regime, *pair) for pair in lab.replicates)
        if found := next(filter(None, known), None):
            return found._replace(seed=seed, split=split)
    untuned, counts, tuners = lab.system(seed), {}, []
    readers = [(untuned, np.arange(len(lab.test)))]  # who reads which questions
    if name != BASE:
        variant = VARIANTS[name]
        how = {"unanswerable": lab.config.unanswerable} | variant.generate
        made = lab.generated(name, seed, variant.elsewhere, **how)
        counts = pipeline.total_counts([some.steps for some in made.values()])
        task = task_of(variant, lab.system(seed, variant.elsewhere), made, seed)
        members = range(len(lab.silos)) if regime == "local" else (None,)
        readers = []
        for client in members:
            tuner = lab.tuner(name, regime, made, seed, client)
            own = lab.asked_of == client if client is not None else np.ones(len(lab.test), bool)
            readers.append((untuned.replace(**tuner(task)), np.flatnonzero(own)))
            tuners.append(tuner)
    cost = sum((c for tuner in tuners for c in tuner.costs.values()), Cost())
    clock, scores = Clock(), {}
    for system, own in readers:
        if not len(own):
            continue
        for metric, values in read(lab, system, own, f"{name}-{regime}-seed{seed}").items():
            scores.setdefault(metric, np.full(len(lab.test), np.nan))[own] = values
    cost += Cost.of_evaluation(clock.lap())
    curves = training_curves(tuners)
    return cells.Cell(
        name, regime, seed, split, scores, counts, [], cost, curves, lab.test_clusters
    )


def read(lab: LabelFreeLab, system, own: np.ndarray, cell: str) -> dict[str, np.ndarray]:
    """Returns scores of test questions; `<metric>_<n>` has the gold passage forced into n passages.

    `hard_<n>` is whether it had to be forced in, `recall_at_<n>` of retrieval; with most passages,
    `<metric>_found` is from end to end. Where the gold passage is left out, `abstained_none` is whether
    none is cited, and `em_none` whether the answer is right anyway: memorised, because training and
    test questions are about the same texts.
    """
    config, questions, scores = lab.config, [lab.test[i] for i in own], {}
    most = max(config.contexts)
    pool = lab.pool if config.silos else None
    for n in config.contexts:
        contexts, hard = lab.contexts(n, "forced")
        judge = None
        if n == most and (author := endpoint(config.judge)):
            judge = functools.partial(
                judged, author, folder=lab.folder / "judged" / cell, repeats=config.judge.repeats
            )
        found = evaluate_citing(system, questions, [contexts[i] for i in own], judge)
        scores |= {f"{metric}_{n}": values for metric, values in found.items()}
        scores[f"hard_{n}"] = hard[own].astype(float)
        contexts, hard = contexts_of(system.retriever, questions, n, forced=False, pool=pool)
        scores[f"recall_at_{n}"] = 1.0 - hard
        if n == most:
            found = evaluate_citing(system, questions, contexts)
            scores |= {f"{metric}_found": found[metric] for metric in METRICS}
    contexts, _ = lab.contexts(most, "none")
    found = evaluate_citing(system, questions, [contexts[i] for i in own])
    return scores | {"abstained_none": found["abstained"], "em_none": found["em"]}


def check(config) -> None:
    """Checks the config before anything is computed.

    Raises:
      ConfigError: names the setting, its value and what it may be.
    """
    check_replicates(config)
    require_some(config, "variants", "regimes", "contexts")
    if config.data.split not in ("test", "validation", "train"):
        raise ConfigError(
            f"config.data.split: 'test', 'validation' or 'train', got {config.data.split!r}"
        )
    require_known("config.variants", config.variants, (BASE, *VARIANTS))
    require_known("config.regimes", config.regimes, config.learning_rates)
    if {*config.regimes} - {"centralised"} and not config.silos:
        raise ConfigError("config.regimes: federated and local need --config.silos")
    if config.silos and "pretraining_world" in config.variants:
        raise ConfigError("config.variants: pretraining_world has no silos")
    if min(config.contexts) < 2:
        raise ConfigError(f"config.contexts: 2 passages at least, got {config.contexts}")
    if config.judge.repeats < 1:
        raise ConfigError(f"config.judge.repeats must be at least 1, got {config.judge.repeats}")
    for where in ("author", "judge"):
        endpoint(config[where])  # refuses a package that is missing
        if config[where].endpoint and not config[where].model:
            raise ConfigError(
                f"config.{where}.model is empty: name the model at {config[where].endpoint}"
            )


def variants(config) -> list[str]:
    """Returns the config's variants that suit its generator; prints a note on the others."""
    if "builtin:" in config.models.generator or "pretraining_world" not in config.variants:
        return [*config.variants]
    print("pretraining_world left out: a control of the built-in generator alone", flush=True)
    return [name for name in config.variants if name != "pretraining_world"]


def lab(config, folder: pathlib.Path) -> LabelFreeLab:
    """Returns the lab with the texts and models of the config.

    Raises:
      ConfigError: as `check`.
      DataError: a generator whose replies leave nothing to train on.
    """
    check(config)
    dataset = datasets.of_config(config.data, needed=(config.data.split,))
    lab = LabelFreeLab(config, dataset, folder)
    prompts = lab.system(config.seeds[0]).prompts
    prompts.require_citing()
    if prompts.share_cut > 0.01:
        print(
            f"{prompts.share_cut:.0%} of the texts are longer than config.models.max_passage_tokens="
            f"{config.models.max_passage_tokens}: questions are about all of a text, and its beginning "
            "is read",
            flush=True,
        )
    for silo in lab.silos:
        lab.prompts(silo)
    return lab


def points(lab: LabelFreeLab) -> list[Point]:
    """Returns all cells, by variant and regime; the untuned variant has one cell for all regimes."""
    config = lab.config
    names = itertools.product(variants(config), config.regimes, replicates(config))
    return [
        Point(name, regime, *pair)
        for name, regime, pair in names
        if name != BASE or regime == config.regimes[0]
    ]


def controls(lab: LabelFreeLab) -> None:
    """Writes the silo of each test question to silos.json, for the report."""
    of_question = {"names": [*lab.silos], "of_question": lab.asked_of.tolist()}
    write_json(lab.folder / "silos.json", of_question)


def summary(cell) -> str:
    """Returns a line with the mean scores of a cell at the largest number of passages."""
    most = max(int(m.removeprefix("em_")) for m in cell.scores if m.removeprefix("em_").isdigit())
    return f"EM {100 * cell.scores[f'em_{most}'].mean():.1f}  citation " + (
        f"{100 * cell.scores[f'citation_{most}'].mean():.1f}"
    )


EXPERIMENT = Experiment(
    name="aloftrag",
    free=("seeds", "split_seeds", "variants", "regimes"),
    lab=lab,
    points=points,
    compute=compute,
    summary=summary,
    report=aloftrag_report.report,
    controls=controls,
)
