"""Fine-tuning strategies, and running one strategy for several systems.

A strategy tunes a system by `tune(task) -> trainable`, which trains a task in the regime of the
experiment. The strategy does not know whether the regime is federated. Its tasks are a generator
function, which yields each task and receives the trained parameters.
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
      name: name in configs, on the command line and in file names.
      tasks: generator function `(system, dataset)`; yields the tasks, returns the tuned system.
      label: label in figures; the name if empty.
      color, marker: Matplotlib color and marker in figures; chosen automatically if empty.
      needs_gold: whether training questions must name their gold passages.
      rates: the name of the learning rate in `config.learning_rates`, for each trained part or task.
      mode: answering mode of its systems, see `generation.inference`; the config's mode if empty.
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
        """Returns the tuned system."""
        (found,) = tune_systems(
            self, [system], dataset, lambda asked: [tune(task) for _, task in asked]
        )
        return found


def strategy(label: str = "", color: str = "", marker: str = "", **about):
    """Decorator that turns a generator function into a `Strategy` with the function's name.

    Args:
      about: `needs_gold`, `rates` and `mode`.
    """

    def made(tasks: Callable[[RAGSystem, Dataset], Tasks]) -> Strategy:
        return Strategy(tasks.__name__, tasks, label, color, marker, **about)

    return made


def tune_systems(
    strategy: Strategy, systems: Sequence[RAGSystem], dataset: Dataset, tune_all
) -> list[Any]:
    """Tunes several systems with one strategy.

    Args:
      tune_all: `tune_all([(i, task), ...]) -> [trainable or exception, ...]`; i counts the systems.

    Returns:
      The tuned systems; an exception for each system whose training raised it.
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
