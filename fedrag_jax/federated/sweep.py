"""Runs many fits at once: a grid of learning rates, seeds or clients."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from fedrag_jax.errors import DivergenceError
from fedrag_jax.federated.engine.round import Ran, Round
from fedrag_jax.federated.engine.scheduling import Scheduler, by_program
from fedrag_jax.federated.fit import FitResult, fit
from fedrag_jax.objectives.task import Task

Trained = TypeVar("Trained")
RECENT = 16  # tables, and findings, that fits of one task may have in common


def require_trained(results: Sequence[Trained | Exception]) -> list[Trained]:
    """Returns the results of trainings, none of which may have failed.

    Raises:
      DivergenceError: or another failure, the first of them.
    """
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if not isinstance(result, Exception)]


def sweep(fits: Sequence[Mapping[str, Any]]) -> list[FitResult | DivergenceError]:
    """Runs fits together; each has the same result as if it ran alone.

        sweep([{"task": task, "data": data, "optimizer": adamw(rate)} for rate in grid])

    All fits run their first round, then their second, and so on. Fits whose rounds are the same
    program, because they differ only in numbers (learning rates, seeds, examples), run in the fastest
    of three ways: one after the other, distributed over the devices, or also side by side on each
    device. Each way is measured on a round of the sweep, and the best is remembered per device and
    program. Fits of one `Task` share its initial retrieval, its collated batches and its frozen arrays.
    All states are in memory at once.

    Args:
      fits: the arguments of each `fit`, by name.

    Returns:
      The result of each fit, in order; a DivergenceError for a fit that diverged.

    Raises:
      As `fit` does, except for divergence.
    """
    tasks = {id(f["task"]): f["task"] for f in fits}
    shared = {name: _sharing(task) for name, task in tasks.items()}
    ask: Callable[..., Generator[Round, Any, Any]] = fit.rounds
    asking = [ask(**{**f, "task": shared[id(f["task"])]}) for f in fits]
    results: list[Any] = [None] * len(fits)
    asked: dict[int, Round] = {}
    scheduler = Scheduler()

    def go_on(i: int, ran: Ran | None) -> None:
        try:
            asked[i] = asking[i].send(ran)
        except StopIteration as done:
            results[i] = done.value
        except DivergenceError as error:
            results[i] = error

    for i in range(len(fits)):
        go_on(i, None)
    while asked:
        now, asked = asked, {}
        for program, group in by_program(now):
            ran = scheduler.run(program, [now[i] for i in group])
            for i, r in zip(group, ran, strict=True):
                go_on(i, r)
    return results


def _sharing(task: Task) -> Task:
    """Returns the task with cached results for fits that start alike."""
    tables, found = _Recent(), _Recent()

    def collate(examples, retrieved):
        about = None if retrieved is None else retrieved.tobytes()
        return tables.get(examples, about, lambda: task.collate(examples, retrieved))

    search = task.retrieve

    def retrieve(examples, trainable, *index):
        assert search is not None
        if index or not _equal(trainable, task.trainable):
            return search(examples, trainable, *index)
        return found.get(examples, None, lambda: search(examples, trainable))

    frozen = jax.tree.map(jax.numpy.asarray, task.frozen)
    shared = None if search is None else retrieve
    return dataclasses.replace(task, frozen=frozen, collate=collate, retrieve=shared)


def _equal(one, other) -> bool:
    # With an algorithm that changes the base, one of them has it beside the adapters.
    leaves, structures = zip(*map(jax.tree.flatten, (one, other)), strict=True)
    return structures[0] == structures[1] and all(map(np.array_equal, *leaves))


class _Recent:
    """Caches the last few results for some examples."""

    def __init__(self):
        self.made = {}

    def get(self, examples, about, make):
        where = tuple(map(id, examples)), about
        if where not in self.made:
            if len(self.made) == RECENT:
                del self.made[next(iter(self.made))]
            # Held on to, lest others get their identities.
            self.made[where] = examples, make()
        return self.made[where][1]
