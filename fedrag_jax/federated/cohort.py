"""Who trains in a round, on which examples, in which order.

Everything here is a function of (seed, round, client): the same whatever the group size, and the
same again in a resumed run.
"""

from typing import NamedTuple

import numpy as np

from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm


class Cohort(NamedTuple):
    """Clients of a round: K of them, S local steps, batches of B.

    Attributes:
      clients: int32 [K] numbers; one past the last client marks padding.
      size: float32 [K] how many examples each holds; 0 marks padding.
      indices: int32 [K, S, B] rows of the table.
      step_mask: bool [K, S] False for steps that only fill up to S.
      example_weight: float32 [K, S, B] 0 for rows that only fill up to B.
    """

    clients: np.ndarray
    size: np.ndarray
    indices: np.ndarray
    step_mask: np.ndarray
    example_weight: np.ndarray


def cohort_size(data: Partition, algorithm: Algorithm) -> int:
    """How many clients take part in a round.

    Raises:
      ConfigError: clients_per_round not between 1 and the number of clients.
    """
    total, wanted = len(data.clients), algorithm.clients_per_round
    if wanted is not None and not 1 <= wanted <= total:
        raise ConfigError(
            f"{algorithm.name}: clients_per_round must be between 1 and the {total} clients "
            f"of the partition, got {wanted}"
        )
    return wanted or total


def sample_cohort(
    data: Partition, algorithm: Algorithm, round: int, batch_size: int, seed: int
) -> Cohort:
    """Draws clients without replacement, in ascending order, and lays out their batches.

    Args:
      round: from 0.

    Returns:
      `Cohort`. With `local_steps` a client walks through shuffled epochs of its own examples and
      goes on in the next round where it stood: S batches, all full unless it holds fewer than B.
      With `local_epochs` it makes whole passes, the last batch of each filled up; S is that of the
      largest client, drawn or not, so that all rounds have one shape.
    """
    total, size = len(data.clients), cohort_size(data, algorithm)
    clients = np.arange(total)
    if size < total:
        draw = stream(seed, "client sampling", round)
        clients = np.sort(draw.choice(total, size, replace=False))
    if algorithm.local_epochs is None:
        steps = algorithm.local_steps
    else:
        largest = max(map(len, data.clients))
        steps = algorithm.local_epochs * -(-largest // batch_size)

    shape = (size, steps, batch_size)
    indices, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for k, client in enumerate(clients):
        rows = data.clients[client]
        if algorithm.local_epochs is None:
            width = min(batch_size, len(rows))
            start = round * steps * width
            walked = _walk(rows, start, start + steps * width, seed, client)
            indices[k, :, :width] = walked.reshape(steps, width)
            weight[k, :, :width] = 1
        else:
            per_epoch = -(-len(rows) // batch_size)
            for e in range(algorithm.local_epochs):
                start = (round * algorithm.local_epochs + e) * len(rows)
                here = slice(e * per_epoch, (e + 1) * per_epoch)
                flat = np.zeros((2, per_epoch * batch_size))
                flat[0, : len(rows)] = _walk(rows, start, start + len(rows), seed, client)
                flat[1, : len(rows)] = 1
                indices[k, here], weight[k, here] = flat.reshape(2, per_epoch, batch_size)
    return Cohort(
        clients=clients.astype(np.int32),
        size=np.array([len(data.clients[c]) for c in clients], np.float32),
        indices=indices,
        step_mask=weight.any(-1),
        example_weight=weight,
    )


def grouped(cohort: Cohort, group_size: int, total: int) -> Cohort:
    """[K, ...] as [G, g, ...]; weightless clients, numbered `total`, fill the last group."""
    missing = -len(cohort.clients) % group_size

    def reshape(x, fill=0):
        padding = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
        padded = np.pad(x, padding, constant_values=fill)
        return padded.reshape(-1, group_size, *x.shape[1:])

    return Cohort(reshape(cohort.clients, total), *(reshape(x) for x in cohort[1:]))


def _walk(rows: np.ndarray, start: int, stop: int, seed: int, client: int) -> np.ndarray:
    """Places start..stop of the endless walk through shuffled epochs of a client's rows."""
    n = len(rows)
    first = start // n
    epochs = [
        stream(seed, "local shuffling", client, epoch).permutation(rows)
        for epoch in range(first, -(-stop // n))
    ]
    return np.concatenate(epochs)[start - first * n : stop - first * n]
