"""All objectives by name, as tasks for a RAG system.

task = OBJECTIVES["pdist"].task(system, dataset)
system = system.replace(**fit(task, dataset.train).trainable)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.objectives.distillation import distillation, distilled
from fedrag_jax.objectives.generator import closed_book, concatenated, ralt
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.objectives.raft import oracle, raft, recorded
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.objectives.task import Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.mining import Mining
from fedrag_jax.strategies.teachers import question_likelihood


class Objective(NamedTuple):
    """One way to tune a part of a RAG system.

    Attributes:
      part: "retriever", "generator" or "both".
      task: function `task(system, dataset) -> Task`; pass the trained parts to `RAGSystem.replace`. It
        raises ConfigError for a system without passages of its own.
      labels: whether training questions must name their gold passages.
      batch: batch size as a multiple of the usual one.
    """

    part: str
    task: Callable[[RAGSystem, Dataset], Task]
    labels: bool = False
    batch: int = 1


def _ranking(batch: int = 1, **options) -> Objective:
    def task(system, dataset):
        _require_passages(system)
        return multiple_negatives_ranking(
            system.retriever, dataset, score_scale=system.score_scale, **options
        )

    return Objective("retriever", task, labels=True, batch=batch)


def _matryoshka(system: RAGSystem, dataset: Dataset) -> Task:
    head, bare = system.retriever.head, system.retriever.bare_vectors
    size = (bare if head is None else head).shape[1]  # euclidean vectors have two numbers more
    return _ranking(dimensions=(size // 4, size // 2, size)).task(system, dataset)


def _taught(method: str, **options) -> Objective:
    def task(system, dataset):
        return distillation(
            method,
            *_generator(system, dataset),
            system.retriever,
            dataset.train,
            passages=system.marginal_k,
            score_scale=system.score_scale,
            **options,
        )

    return Objective("retriever", task)


def _asked_about(system: RAGSystem, dataset: Dataset) -> Task:
    _require_passages(system)
    teacher = question_likelihood(system)
    return distilled(
        teacher,
        system.retriever,
        dataset.train,
        passages=system.marginal_k,
        score_scale=system.score_scale,
        # A mean over tokens differs little between passages: at 1 it would ask for all alike.
        temperature=0.1,
    )


def marginal_task(
    system: RAGSystem, dataset: Dataset, train: tuple[str, ...], marginal: str
) -> Task:
    """Returns the task of RAG-Token or RAG-Sequence for some parts of a system."""
    # Passages beyond those that are read teach the retriever alone, where it moves.
    passages = system.marginal_k if "query" in train else system.top_k
    return marginal_likelihood(
        *_generator(system, dataset),
        system.retriever,
        dataset.train,
        train=train,
        marginal=marginal,
        passages=passages,
        score_scale=system.score_scale,
    )


def _joint(marginal: str) -> Objective:
    def task(system, dataset):
        return marginal_task(system, dataset, ("adapters", "query"), marginal)

    return Objective("both", task)


def _reading(make, rows: Callable) -> Objective:
    """Returns an objective of the generator whose prompts hold `rows(system, dataset)(examples)`."""

    def task(system, dataset):
        decoder, parts, prompts = _generator(system, dataset)
        found = rows(system, dataset)
        return make(decoder, parts["decoder"], parts["adapters"], prompts, found)

    return Objective("generator", task)


def _trained_on(make, **options) -> Objective:
    """Returns an objective of the generator whose prompts depend on the gold passages."""

    def task(system, dataset):
        decoder, parts, prompts = _generator(system, dataset)
        how = {name: value(system) for name, value in options.items()}
        parameters = parts["decoder"], parts["adapters"]
        return make(decoder, *parameters, prompts, system.retriever, dataset.train, **how)

    return Objective("generator", task, labels=True)


def _closed_book(system: RAGSystem, dataset: Dataset) -> Task:
    decoder, parts, prompts = _generator(system, dataset)
    return closed_book(decoder, parts["decoder"], parts["adapters"], prompts)


def _generator(system: RAGSystem, dataset: Dataset):
    _require_passages(system)
    parts = {"decoder": system.generator.params, "adapters": system.adapters}
    # A loaded system was not built for these questions. For one that was, the widths stay the same.
    return system.decoder, parts, system.prompts.wide_enough_for(dataset.train)


def _require_passages(system: RAGSystem) -> None:
    if not len(system.retriever.passages):
        raise ConfigError(
            "training searches the system's own passages, and this system has none: build it with "
            "`passages`, such as those of its store (store.passages())"
        )


def retrieved_rows(system: RAGSystem, dataset: Dataset) -> Callable:
    """Returns `rows(examples) -> int [N, top_k]`: rows found by the system's retriever, searched
    once."""
    known: dict[str, np.ndarray] = {}

    def rows(examples) -> np.ndarray:
        missing = [e for e in examples if e.id not in known]
        if missing:
            found, _ = system.retriever.search([e.question for e in missing], system.top_k)
            known.update(zip((e.id for e in missing), found, strict=True))
        return np.stack([known[e.id] for e in examples])

    return rows


OBJECTIVES = {
    "in_batch": _ranking(),
    "mined": _ranking(mining=Mining(count=2)),
    "large_batch": _ranking(batch=16, at_once=16),
    "matryoshka": Objective("retriever", _matryoshka, labels=True),
    "both_sides": _ranking(train=("query", "document")),
    "head": _ranking(train=("head",)),
    "lsr": _taught("lsr"),
    "replug": _taught("replug"),
    "replug_log": _taught("replug", signal="log_probability"),
    "pdist": _taught("pdist"),
    "adist": _taught("adist"),
    "loop": _taught("loop"),
    "emdr": _taught("emdr"),
    "question_likelihood": Objective("retriever", _asked_about),
    "concatenated": _reading(concatenated, retrieved_rows),
    "ralt": _reading(ralt, retrieved_rows),
    # With reasoning where the prompt style has a mark that ends it.
    "raft": _trained_on(
        raft, teacher=lambda system: recorded if system.prompts.style.final else None
    ),
    "oracle": _trained_on(oracle),
    "closed_book": Objective("generator", _closed_book),
    "rag_token": _joint("token"),
    "rag_sequence": _joint("sequence"),
}
