"""What a fine-tuning strategy is, and how several systems are taken through one.

A strategy tunes a system by `tune(task) -> trainable`, which trains a task in the regime of the
experiment: it does not know whether that is federated. Its tasks are a generator function, which yields
each task and is sent what was trained.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fedrag_jax.data.examples import Dataset
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.rag import RAGSystem

Tune = Callable[[Task], PyTree]
Tasks = Generator[Task, PyTree, RAGSystem]
USUAL_RATES = MappingProxyType(
    {"adapters": "generator", "query": "retriever", "document": "retriever", "head": "retriever"}
)


@dataclasses.dataclass(frozen=True, eq=False)
class Strategy:
    """One row of the table of strategies; calling it tunes a system.

    Attributes:
      name: in configs, on the command line and of files.
      tasks: generator function `(system, dataset)`; yields the tasks, returns the tuned system.
      label: in figures; the name if empty.
      color, marker: in figures, as Matplotlib knows them; of their own if empty.
      needs_gold: whether training questions must name their gold passages.
      rates: for each part that it trains, or for a task by its name, the name of the learning rate in
        `config.learning_rates`.
      mode: how its systems answer, see `generation.inference`; as the config says if empty.
    """

    name: str
    tasks: Callable[[RAGSystem, Dataset], Tasks]
    label: str = ""
    color: str = ""
    marker: str = ""
    needs_gold: bool = False
    rates: Mapping[str, str] = dataclasses.field(default_factory=lambda: USUAL_RATES)
    mode: str = ""

    def __call__(self, system: RAGSystem, dataset: Dataset, tune: Tune) -> RAGSystem:
        """The tuned system."""
        (found,) = tune_systems(
            self, [system], dataset, lambda asked: [tune(task) for _, task in asked]
        )
        return found


def strategy(label: str = "", color: str = "", marker: str = "", **about):
    """Makes a `Strategy` of a generator function; its name is the function's.

    Args:
      about: `needs_gold`, `rates` and `mode`.
    """

    def made(tasks: Callable[[RAGSystem, Dataset], Tasks]) -> Strategy:
        return Strategy(tasks.__name__, tasks, label, color, marker, **about)

    return made


def tune_systems(
    strategy: Strategy, systems: Sequence[RAGSystem], dataset: Dataset, tune_all
) -> list[Any]:
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
