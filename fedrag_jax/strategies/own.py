"""Strategies by name: those of the table, single objectives, and a user's own."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from fedrag_jax.data.examples import Dataset
from fedrag_jax.errors import ConfigError
from fedrag_jax.objectives.task import Task
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.objectives import OBJECTIVES, Objective
from fedrag_jax.strategies.strategies import STRATEGIES
from fedrag_jax.strategies.strategy import USUAL_RATES, Strategy, Tasks

PARTS = ("adapters", "query", "document", "head")  # of a system, that a task can train


def named(name: str) -> Strategy:
    """Returns the strategy with a name.

    Args:
      name: one of `STRATEGIES`; one of `OBJECTIVES` with the usual batch size, which is trained alone;
        or "module:name" of one of these:
        a function `(system, dataset) -> Task`, whose task is trained and put into the system;
        an `Objective`, like those in `OBJECTIVES`;
        a `Strategy`, which may train several tasks.

    Raises:
      ConfigError: there is no such strategy, or the module cannot be imported.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    alone = {n: objective for n, objective in OBJECTIVES.items() if objective.batch == 1}
    if name in alone:
        return of_objective(name, alone[name])
    module, mark, attribute = name.partition(":")
    if not mark:
        raise ConfigError(
            f"unknown strategy {name!r}; choose among {[*STRATEGIES]}, among the objectives "
            f"{[*alone]}, or name your own as module:name"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"strategy {name!r} cannot be imported ({error}); its module must be on the Python path "
            "(PYTHONPATH=.) and hold that name"
        ) from error
    if isinstance(found, Strategy):
        return found
    if isinstance(found, Objective):
        return of_objective(name, found)
    if not callable(found):
        raise ConfigError(
            f"strategy {name!r} is {found!r}; it must be a function (system, dataset) -> Task, an "
            "Objective or a strategy"
        )
    return of_task(name, found)


def of_objective(name: str, objective: Objective) -> Strategy:
    """Returns the strategy that trains one objective, with the learning rate of its part."""
    rates = {part: rate for part, rate in USUAL_RATES.items() if objective.part in (rate, "both")}
    return of_task(name, objective.task, needs_gold=objective.labels, rates=rates)


def of_task(name: str, make: Callable[[RAGSystem, Dataset], Task], **about) -> Strategy:
    """Returns the strategy that trains one task, whose results are stored under the strategy's name.

    The task's own name is not used, because two objectives with the same name would share results.

    Args:
      about: `needs_gold` and `rates` of the `Strategy`.
    """

    def tasks(system: RAGSystem, dataset: Dataset) -> Tasks:
        task: Any = make(system, dataset)
        if not isinstance(task, Task):
            raise ConfigError(f"strategy {name!r} returned {task!r}, which is not a Task")
        if unknown := [part for part in task.trainable if part not in PARTS]:
            raise ConfigError(
                f"strategy {name!r} trains {unknown}, which no system has; name the parts as in "
                f"{[*PARTS]}, or train it by `fit`"
            )
        return system.replace(**(yield dataclasses.replace(task, name=name, label="")))

    return Strategy(name, tasks, **about)
