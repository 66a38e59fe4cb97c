"""The table that steps gather their examples from: which rows, what they retrieved, what they hold."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import DataError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.engine.cohort import sample_cohort
from fedrag_jax.federated.work import Work
from fedrag_jax.objectives.task import Task


def warn_of_idle_clients(task: Task, data: Partition, batch_size: int) -> None:
    """Warns of clients that learn nothing from their examples.

    Raises:
      ConfigError: a batch size with which nobody learns.
      DataError: no client learns, if there are several. A single client may belong to local training,
        where others learn.
    """
    if task.idle is None:
        return
    held = {c: data.of(c) for c in range(len(data.clients))}
    idle = {c: why for c, some in held.items() if (why := task.idle(some, batch_size))}
    if not idle:
        return
    first = min(idle)
    told = (
        f"fit: {len(idle)} of {len(data.clients)} clients learn nothing from {task.name!r}, client "
        f"{first} first: {idle[first]}"
    )
    if len(idle) == len(data.clients) > 1:
        raise DataError(told)
    warnings.warn(told, stacklevel=3)


def used_rows(
    data: Partition, work: Work, first: int, count: int, batch_size: int, seed: int, height: int
) -> np.ndarray:
    """Returns the rows of the examples that `count` rounds from `first` on use, in ascending order.

    Other examples are neither retrieved nor collated. Padded to at least `height` rows, so that later
    stretches of rounds have the same shape.
    """
    rows = held = np.sort(np.concatenate(data.clients))
    cohort = sample_cohort(data, work, first, batch_size, seed)
    room = count * work.sampling.places(data.sizes()) * np.prod(cohort.indices.shape[1:])
    if room < len(held):
        others = (sample_cohort(data, work, first + i, batch_size, seed) for i in range(1, count))
        trained = [c.indices[c.example_weight > 0] for c in (cohort, *others)]
        rows = np.unique(np.concatenate(trained))
        rows = rows if rows.size else held[:1]  # nobody may have been drawn
    height = max(height, min(room, len(held)))
    return np.pad(rows, (0, max(height - len(rows), 0)), constant_values=rows[0])


def retrieve(
    task: Task,
    data: Partition,
    rows,
    algorithm: Algorithm,
    state: State,
    frozen: PyTree,
    index: Any,
) -> tuple[np.ndarray, Any]:
    """Retrieves for each example, with the model that trains on it; returns rows and index.

    If the algorithm changes frozen parts, the task also receives those.

    Args:
      index: the index of the previous retrieval.

    Returns:
      int32 [len(rows), k], and the task's index or None.
    """
    rows, inverse = np.unique(rows, return_inverse=True)
    if algorithm.model is None:
        examples = [data.examples[i] for i in rows]
        now = algorithm.frozen(state, frozen)
        model = state.trainable
        if now is not frozen:
            model = model | {name: x for name, x in now.items() if x is not frozen[name]}
        if task.index is None:
            return np.asarray(task.retrieve(examples, model))[inverse], None
        found, index = task.retrieve(examples, model, index or task.index)
        return np.asarray(found)[inverse], jax.device_get(index)
    retrieved: np.ndarray | None = None
    for client, held in enumerate(data.clients):
        own = np.flatnonzero(np.isin(rows, held))
        if not own.size:
            continue
        row = jax.tree.map(lambda x, c=client: x[c], state.population)
        model = algorithm.model(state.trainable, row)
        found = np.asarray(task.retrieve([data.examples[i] for i in rows[own]], model))
        if retrieved is None:
            retrieved = np.zeros((len(rows), *found.shape[1:]), found.dtype)
        retrieved[own] = found
    return retrieved[inverse], None


def collate(task: Task, examples: Sequence[Any], rows, retrieved) -> dict[str, np.ndarray]:
    """Returns the table of `rows`; repeated rows are collated once."""
    rows, index, inverse = np.unique(rows, return_index=True, return_inverse=True)
    found = None if retrieved is None else retrieved[index]
    table = task.collate([examples[i] for i in rows], found)
    for name, column in table.items():
        if name == "weight" or len(column) != len(rows):
            raise DataError(
                f"task {task.name!r}: column {name!r} of the table has shape {np.shape(column)}; "
                f"collate must return one row for each of the {len(rows)} examples, "
                'and no column named "weight"'
            )
    return {name: np.asarray(column)[inverse] for name, column in table.items()}
