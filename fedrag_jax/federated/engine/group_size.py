"""The number of clients to train side by side, measured once per device and remembered.

One after another is fastest on a CPU, many at once on an accelerator, until its memory is full.
"""

import hashlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fedrag_jax.data.cache import recall, remember
from fedrag_jax.federated.algorithm import PyTree, stack
from fedrag_jax.federated.engine.client import local_update
from fedrag_jax.federated.engine.cohort import Cohort
from fedrag_jax.objectives.task import Task

MEMORY = "group_sizes.json"
REPEATS = 3
WORTH = 0.95  # a larger group takes more memory: it has to be so much faster for each client


def choose_group_size(
    task: Task, optimizer, frozen: PyTree, table: dict, batch_size: int, most: int
) -> int:
    """Returns the group size with the least time per client-step.

    Tries 1, 2, 4 and so on up to `most` while larger groups are faster and fit into memory. The result
    is stored in `group_sizes.json` of the cache folder, by device, task and shapes. Among several
    processes, the first decides.
    """
    if most == 1:
        return 1
    found = _remembered(task, optimizer, frozen, table, batch_size, most)
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return found


def _remembered(task, optimizer, frozen, table, batch_size, most) -> int:
    if jax.process_index():
        return 0
    key = _key(task, table, batch_size, most)
    size = recall(MEMORY, key)
    if size is None:
        size = _measured(task, optimizer, frozen, table, batch_size, most)
        remember(MEMORY, key, size)
    return size


def _measured(task, optimizer, frozen, table, batch_size, most) -> int:
    best, least = 1, float("inf")
    size = 1
    while size <= most:
        try:
            seconds = _seconds(task, optimizer, frozen, table, batch_size, size) / size
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error) and size > 1:
                break
            raise
        if seconds > WORTH * least:
            break
        best, least = size, seconds
        size *= 2
    return best


def _seconds(task, optimizer, frozen, table, batch_size, size) -> float:
    """Returns the median seconds of one local step of `size` clients side by side."""
    trainable = jax.tree.map(jnp.asarray, task.trainable)
    height = len(jax.tree.leaves(table)[0])
    members = Cohort(
        clients=np.arange(size, dtype=np.int32),
        share=np.ones(size),
        steps=np.ones(size, np.int32),
        indices=np.arange(size * batch_size, dtype=np.int32).reshape(size, 1, -1) % height,
        example_weight=np.ones((size, 1, batch_size), np.float32),
    )

    @jax.jit
    def step(trainable, frozen, table, members, key):
        client = local_update(task.loss, optimizer, frozen, table, key)
        x = stack(trainable, size)
        return client.update(x, client.init(x), members)

    arguments = trainable, frozen, table, members, jax.random.key(0)
    jax.block_until_ready(step(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _key(task, table, batch_size, most) -> str:
    def shapes(tree):
        return [(jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(tree)]

    rows = {name: (column.shape[1:], str(column.dtype)) for name, column in table.items()}
    about = shapes(task.trainable), shapes(task.frozen), sorted(rows.items()), batch_size, most
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return f"{jax.devices()[0].device_kind} x{jax.device_count()}, {task.name}, {digest}"
