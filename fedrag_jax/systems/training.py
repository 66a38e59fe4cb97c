"""Tunes a saved system on questions about its passages."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax import files
from fedrag_jax.data.examples import Dataset, Example, content_hash
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import natural
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.evaluation.benchmarks.identity import corpus_of, identity
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.own import named
from fedrag_jax.strategies.regimes import Budget, split_clients
from fedrag_jax.strategies.tuner import Tuner
from fedrag_jax.systems.system_like import system_like

SETTINGS = "settings.json"
PARTS = ("query", "adapters")  # that can change while the vectors stay
SCORES = ("em", "f1", "recall_at_5", "mrr")


class Trial(NamedTuple):
    """One training run.

    Attributes:
      factor: the factor of the learning rates.
      scores: means of `SCORES` on validation questions, in [0, 1]; empty if training diverged.
    """

    factor: float
    scores: dict[str, float]


class Trained(NamedTuple):
    """The result of `train`.

    Attributes:
      system: the tuned system, over the store of the original one.
      before: validation scores of the original system.
      best: the trial that produced the tuned system.
      test: scores on test questions before and after; empty without test questions.
    """

    system: RAGSystem
    before: dict[str, float]
    trials: list[Trial]
    best: Trial
    test: dict[str, dict[str, float]]


def split(
    examples: Sequence[Example], regime: str, clients: int, alpha: float, seed: int
) -> Partition:
    """Splits questions over clients by Dirichlet(alpha) over topics; 0 clients give one per topic."""
    if regime == "centralised":
        return Partition(examples, (np.arange(len(examples)),))
    if clients == 0:
        return partition(examples, natural("topic"), seed=seed)
    return split_clients(examples, clients, alpha, "topic", seed)


def train(
    system: RAGSystem,
    dataset: Dataset,
    folder: pathlib.Path,
    *,
    strategy: str,
    regime: str,
    budget: Budget,
    clients: Partition,
    rates: Mapping[str, float],
    factors: Sequence[float],
    seed: int = 0,
    algorithm: str = "fedavg",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Trained:
    """Trains once for each factor of the learning rates, and returns the best by validation score.

    Args:
      folder: folder of finished results, from which the same call resumes after a kill.
      regime: "centralised" or "federated".
      rates: learning rates of the trained parts: `query`, `adapters` or both. Others have no place in a
        system over its store's vectors.
      algorithm, options: the algorithm of the federated regime, see `federated.algorithms.by_name`.

    Raises:
      ConfigError: a strategy that needs gold passages where questions have none, rates that are not
        positive or of other parts, a folder with other results, or where another process trains; all
        trainings diverged.
    """
    row = named(strategy)
    mode = row.mode or "concatenated"
    bare = sum(not e.positive_ids for e in dataset.train)
    if row.needs_gold and bare:
        raise ConfigError(
            f"strategy {strategy!r} needs gold passages, and {bare} of {len(dataset.train)} training "
            "questions have no positive_ids: give them, or choose joint_token, which needs none"
        )
    if not factors or not all(0 < x < math.inf for x in (*rates.values(), *factors)):
        raise ConfigError(f"learning rates must be > 0, got {dict(rates)} times {[*factors]}")
    if others := sorted(rates.keys() - {*PARTS}):
        raise ConfigError(_untunable(strategy, others[0], PARTS))
    by_name.check(algorithm, options, "algorithm")
    base = system_like(
        system,
        dataset.passages,
        [*dataset.train, *dataset.validation],
        top_k=min(system.top_k, len(dataset.passages)),
        progress=True,
    )
    with files.hold(folder):
        _settle(
            folder,
            {
                "strategy": strategy,
                "regime": regime,
                "budget": budget._asdict(),
                "rates": dict(rates),
                "seed": seed,
                "algorithm": algorithm,
                "algorithm_options": dict(options),
                "data": content_hash(dataset),
                "reasoning": _hash([json.dumps([e.reasoning for e in dataset.train]).encode()]),
                "clients": _hash(np.asarray(rows, np.int64).tobytes() for rows in clients.clients),
                "system": identity(base, True, corpus_of(base)),
                # What answers do not depend on, but training does.
                "marginal_k": base.marginal_k,
                "max_answer_tokens": base.prompts.max_answer_tokens,
                "searching": base.searching.as_dict(),
            },
        )
        before = _scored(system, dataset.validation, "before training", mode=mode)
        trials, systems = [], {}
        for number, factor in enumerate(factors, 1):
            when = f"rates times {factor:g} ({number} of {len(factors)})"
            _say(f"{when}: training")
            tuner = Tuner(
                folder=folder / f"times-{factor:g}",
                regime=regime,
                examples=dataset.train,
                clients=clients,
                budget=budget,
                rates=functools.partial(_rate, rates, factor),
                seed=seed,
                algorithm=by_name.Named(algorithm, options, base.decoder),
            )
            try:
                tuned = row(base, dataset, tuner)
            except DivergenceError:
                _say(f"{when}: diverged")
                trials.append(Trial(factor, {}))
                continue
            # Over the store again, so that scores are those of the system that is saved.
            own = system.replace(adapters=tuned.adapters, query=tuned.retriever.query)
            tuned = systems[factor] = dataclasses.replace(
                own, generator=tuned.generator, searching=tuned.searching
            )
            trials.append(Trial(factor, _scored(tuned, dataset.validation, when, mode=mode)))
    if not systems:
        raise ConfigError(f"training diverged with all rates, {dict(rates)} times {[*factors]}")
    best = max((t for t in trials if t.scores), key=lambda t: (t.scores["em"], _ranks(t.scores)))
    tuned, test = systems[best.factor], {}
    if dataset.test:
        test = {
            "before": _scored(system, dataset.test, "before training", "test", mode),
            "after": _scored(tuned, dataset.test, "after training", "test", mode),
        }
    return Trained(tuned, before, trials, best, test)


def _rate(rates: Mapping[str, float], factor: float, task: str, part: str) -> float:
    if part not in rates:
        raise ConfigError(_untunable(task, part, rates))
    return rates[part] * factor


def _untunable(task: str, part: str, tuned: Iterable[str]) -> str:
    return (
        f"{task!r} trains {part!r}, and only {[*tuned]} are tuned here, over the vectors that are "
        "there: train it by `fit` or in an experiment"
    )


def _ranks(found: dict[str, float]) -> float:
    return found.get("mrr", 0.0)


def scores(
    system: RAGSystem, examples: Sequence[Example], mode: str = "concatenated"
) -> dict[str, float]:
    """Returns the means of `SCORES`; ranking scores use the questions with gold passages, if any."""
    found = evaluate(system, examples, mode=mode)
    return {m: float(np.nanmean(found[m])) for m in SCORES if not np.isnan(found[m]).all()}


def _scored(
    system: RAGSystem,
    examples: Sequence[Example],
    when: str,
    kind: str = "validation",
    mode: str = "concatenated",
) -> dict[str, float]:
    """Returns `scores`, and says so: a language model answers for minutes on a CPU."""
    _say(f"{when}: answering {len(examples)} {kind} questions")
    found = scores(system, examples, mode)
    percent = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
    _say(f"{when}: {percent}")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _settle(folder: pathlib.Path, settings: dict) -> None:
    """Writes the settings; refuses a folder where a trial was begun with other settings."""
    path, now = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists() and any(file.is_file() for file in folder.glob("times-*/**/*")):
        before = files.read_json(path)
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            what = "; ".join(f"{n} was {before.get(n)}, is {now[n]}" for n in changed)
            raise ConfigError(
                f"{folder} holds a training with other settings: {what}. Choose another folder"
            )
    files.write_json(path, now, indent=2)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b" ")
    return digest.hexdigest()[:16]
