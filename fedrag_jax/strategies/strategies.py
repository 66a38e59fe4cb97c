"""The fine-tuning strategies of Lawton et al. 2025 (arXiv 2510.01600), section 2, and RA-DIT's.

| strategy | trains | objective | needs gold passages |
|---|---|---|---|
| none | nothing | | no |
| retriever | query encoder | multiple-negatives ranking | yes |
| generator | adapters | answer NLL over the base retriever's passages, in one prompt | no |
| ralt | adapters | answer NLL over the same passages, in a prompt each: RA-DIT (2310.01352) | no |
| lsr | query encoder | KL to what the base generator makes of its passages: RA-DIT | no |
| ra_dit | nothing more | puts these two together | no |
| independent | nothing more | puts those two together | yes |
| two_phase | adapters, then query encoder | RAG-Token, the other part frozen | no |
| joint_token | both at once | RAG-Token | no |
| joint_sequence | both at once | RAG-Sequence | no |

A strategy is a function `(system, dataset, tune) -> system`, where `tune(task) -> trainable` trains a
task in the setting of the experiment: the strategies do not know whether that is federated. Written
down, it yields its tasks and is sent what was trained; `together` takes several systems through it.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

from fedrag_jax.data.examples import Dataset
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.objectives import OBJECTIVES, marginal_task

Tune = Callable[[Task], PyTree]
Tasks = Generator[Task, PyTree, RAGSystem]


def strategy(tasks: Callable[[RAGSystem, Dataset], Tasks]):
    """Makes a function `(system, dataset, tune) -> system` of a generator, which stays as `tasks`."""

    @functools.wraps(tasks)
    def tuned(system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
        (found,) = together(
            tuned, [system], dataset, lambda asked: [tune(task) for _, task in asked]
        )
        return found

    tuned.tasks = tasks
    return tuned


def together(strategy, systems: Sequence[RAGSystem], dataset: Dataset, tune_all) -> list[Any]:
    """What a strategy makes of several systems.

    Args:
      tune_all: `tune_all([(i, task), ...]) -> [trainable or exception, ...]`; i counts the systems.

    Returns:
      Tuned systems; an exception in place of one whose training ended in it.
    """
    under_way = [strategy.tasks(system, dataset) for system in systems]
    results: list[Any] = [None] * len(systems)

    def go_on(i, trained):
        try:
            return under_way[i].send(trained)
        except StopIteration as end:
            results[i] = end.value

    asked = [(i, go_on(i, None)) for i in range(len(systems))]
    # Equal systems start with one task, which then retrieves and collates for all of them.
    first = {id(system): task for system, (_, task) in zip(systems, asked, strict=True)}
    asked = [(i, task and first[id(systems[i])]) for i, task in asked]
    while asked := [(i, task) for i, task in asked if task is not None]:
        found, asked = zip(asked, tune_all(asked), strict=True), []
        for (i, _), trained in found:
            if isinstance(trained, Exception):
                results[i] = trained
            else:
                asked.append((i, go_on(i, trained)))
    return results


@strategy
def none(system: RAGSystem, dataset: Dataset) -> Tasks:
    """The system as it came."""
    return system
    yield  # it asks for nothing, and is a generator like the others


@strategy
def retriever(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Query-side tuning on gold passages."""
    return system.replace(**(yield OBJECTIVES["in_batch"].task(system, dataset)))


@strategy
def generator(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Adapters tuned on what the base retriever finds."""
    return system.replace(**(yield OBJECTIVES["concatenated"].task(system, dataset)))


@strategy
def ralt(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Adapters tuned on what the base retriever finds, passage by passage."""
    return system.replace(**(yield OBJECTIVES["ralt"].task(system, dataset)))


@strategy
def lsr(system: RAGSystem, dataset: Dataset) -> Tasks:
    """The query encoder tuned by what the base generator makes of its passages."""
    return system.replace(**(yield OBJECTIVES["lsr"].task(system, dataset)))


@strategy
def ra_dit(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RA-DIT: both of these, each beside the untuned other."""
    read = yield from ralt.tasks(system, dataset)
    found = yield from lsr.tasks(system, dataset)
    return read.replace(query=found.retriever.query)


@strategy
def independent(system: RAGSystem, dataset: Dataset) -> Tasks:
    """The tuned retriever and the tuned generator, which have never met."""
    found = yield from retriever.tasks(system, dataset)
    read = yield from generator.tasks(system, dataset)
    return read.replace(query=found.retriever.query)


@strategy
def two_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token twice: the adapters first, then the query encoder under the tuned generator."""
    system = yield from first_phase.tasks(system, dataset)
    return (yield from second_phase.tasks(system, dataset))


@strategy
def first_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on the adapters, the retriever frozen."""
    return system.replace(**(yield marginal_task(system, dataset, ("adapters",), "token")))


@strategy
def second_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on the query encoder, the generator frozen."""
    return system.replace(**(yield marginal_task(system, dataset, ("query",), "token")))


@strategy
def joint_token(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on both parts at once."""
    return system.replace(**(yield OBJECTIVES["rag_token"].task(system, dataset)))


@strategy
def joint_sequence(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Sequence on both parts at once."""
    return system.replace(**(yield OBJECTIVES["rag_sequence"].task(system, dataset)))


STRATEGIES: dict[str, Callable[..., RAGSystem]] = {
    f.__name__: f
    for f in (
        none,
        retriever,
        generator,
        ralt,
        lsr,
        ra_dit,
        independent,
        two_phase,
        joint_token,
        joint_sequence,
    )
}
