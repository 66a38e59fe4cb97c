"""Many fits at once: a grid of learning rates, seeds or clients as an axis of the compiled round."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedrag_jax.errors import DivergenceError
from fedrag_jax.federated.engine.round import Ran, Round
from fedrag_jax.federated.engine.scheduling import Scheduler, by_program
from fedrag_jax.federated.fit import FitResult, fit
from fedrag_jax.objectives.task import Task

RECENT = 16  # tables, and findings, that fits of one task may have in common


def sweep(fits: Sequence[Mapping[str, Any]]) -> list[FitResult | DivergenceError]:
    """Runs fits side by side, with the numbers each would have by itself.

        sweep([{"task": task, "data": data, "optimizer": adamw(rate)} for rate in grid])

    All make their first round, then their second. Those whose rounds are one program, because they
    differ in numbers alone (learning rates, seeds, examples), are run as one, in the way that is
    fastest here: one after the other, dealt out over the devices, or side by side on each as well. Each
    way is measured on a round that counts and remembered for a device and program. Fits of one
    `Task` share what it retrieves at the start, what it collates and its frozen arrays. All states are
    in memory at once.

    Args:
      fits: the arguments of each `fit` by name.

    Returns:
      What each fit returns, in their order; in place of one that diverged its DivergenceError.

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
    """The task, which works out once what fits that start alike ask for."""
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
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


class _Recent:
    """The last few things made of some examples."""

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
