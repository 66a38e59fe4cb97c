"""Who trains in a round, on which examples, in which order.

Everything here is a function of (seed, round, client): the same whatever the group size or the number
of devices, and the same again in a resumed run.
"""

from typing import NamedTuple

import numpy as np

from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.work import Work

# Groups of fewer clients are formed where a group of this much padding would else be.
MAX_PADDING = 0.15
CLIENTS = "clients"  # the mesh axis that groups are dealt out over


class Cohort(NamedTuple):
    """Clients of a round: K of them, at most S local steps each, batches of B.

    Attributes:
      clients: int32 [K] numbers; one past the last client marks padding.
      share: float [K] p_k, how much its update counts, of sum 1; 0 for padding.
      steps: int32 [K] how many of the S steps each takes.
      indices: int32 [K, S, B] rows of the table.
      example_weight: float32 [K, S, B] 0 for rows that only fill up to B.
    """

    clients: np.ndarray
    share: np.ndarray
    steps: np.ndarray
    indices: np.ndarray
    example_weight: np.ndarray


def sizes_of(data: Partition) -> np.ndarray:
    """int [N], how many examples each client holds."""
    return np.array([len(rows) for rows in data.clients])


def draw_clients(sizes: np.ndarray, work: Work, round: int, seed: int) -> np.ndarray:
    """Clients that receive the model, in ascending order."""
    return np.sort(work.sampling.draw(sizes, stream(seed, "client sampling", round)))


def sample_cohort(data: Partition, work: Work, round: int, batch_size: int, seed: int) -> Cohort:
    """Draws clients, in ascending order, lets some drop out, and lays out the batches of the others.

    Args:
      round: from 0.

    Returns:
      `Cohort`. With `local_steps` a client walks through shuffled epochs of its own examples and
      goes on in the next round where it stood: S batches, all full unless it holds fewer than B.
      With `local_epochs` it makes whole passes, the last batch of each filled up; S is that of the
      largest client, drawn or not, so that all rounds have one shape.
    """
    sizes = sizes_of(data)
    clients = draw_clients(sizes, work, round, seed)
    if work.dropout:
        answers = [stream(seed, "dropout", round, c).random() >= work.dropout for c in clients]
        clients = clients[np.array(answers, bool)]
    steps = work.local_steps
    if work.local_epochs is not None:
        steps = work.local_epochs * -(-int(sizes.max()) // batch_size)

    shape = (len(clients), steps, batch_size)
    indices, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for k, client in enumerate(clients):
        rows = data.clients[client]
        if work.local_epochs is None:
            width = min(batch_size, len(rows))
            start = round * steps * width
            walked = _walk(rows, start, start + steps * width, seed, client)
            indices[k, :, :width] = walked.reshape(steps, width)
            weight[k, :, :width] = 1
        else:
            per_epoch = -(-len(rows) // batch_size)
            for e in range(work.local_epochs):
                start = (round * work.local_epochs + e) * len(rows)
                here = slice(e * per_epoch, (e + 1) * per_epoch)
                flat = np.zeros((2, per_epoch * batch_size))
                flat[0, : len(rows)] = _walk(rows, start, start + len(rows), seed, client)
                flat[1, : len(rows)] = 1
                indices[k, here], weight[k, here] = flat.reshape(2, per_epoch, batch_size)
    done = weight.any(-1).sum(1)
    for k, client in enumerate(clients if work.stragglers else ()):
        rng = stream(seed, "stragglers", round, client)
        if rng.random() < work.stragglers:
            done[k] = rng.integers(1, done[k] + 1)
            weight[k, done[k] :] = 0
    counts = sizes[clients] if work.weighting == "examples" else np.ones(len(clients))
    return Cohort(
        clients=clients.astype(np.int32),
        share=counts / max(counts.sum(), 1),  # nobody may have answered
        steps=done.astype(np.int32),
        indices=indices,
        example_weight=weight,
    )


def grouped(
    cohort: Cohort, group_size: int, data: Partition, work: Work, devices: int = 1
) -> list[Cohort]:
    """The cohort in parts of [G, g, ...], so that little of the computing is padding.

    A group takes as many steps as its busiest client, so clients of about equally many steps go
    together. Where the clients of a partition differ in that, there are parts with groups of
    `group_size`, an eighth of it and so on down to 1, and a group is as large as padding allows.
    G is the same in every round: groups that nobody is in take no steps. It is a multiple of the
    number of devices, each of which gets a stretch of them.
    """
    widths = [group_size]
    if work.local_epochs is not None or work.stragglers:
        while widths[-1] > 1:
            widths.append(max(widths[-1] // 8, 1))
    room = max(work.sampling.places(sizes_of(data)), len(cohort.clients))
    order = np.argsort(-cohort.steps, kind="stable")
    groups = {width: [] for width in widths}
    while order.size:
        width = next(w for w in widths if w == 1 or len(widths) == 1 or _fits(cohort, order[:w], w))
        groups[width].append(order[:width])
        order = order[width:]
    return [_part(cohort, groups[w], w, room, devices, len(data.clients)) for w in widths]


def padding(parts: list[Cohort]) -> float:
    """The share of the computed rows that are no examples, from 0 to 1."""
    computed = sum(p.steps.max(1).sum() * p.steps.shape[1] * p.indices.shape[-1] for p in parts)
    real = sum((p.example_weight > 0).sum() for p in parts)
    return float(1 - real / computed) if computed else 0.0


def _fits(cohort: Cohort, members: np.ndarray, width: int) -> bool:
    steps = cohort.steps[members]
    return steps.sum() >= (1 - MAX_PADDING) * width * steps.max()


def _part(cohort, groups, width, room, devices, total) -> Cohort:
    """Groups dealt out to the devices in turn, each filled up with clients numbered `total`."""
    count = -(-room // width)
    count += -count % devices
    place = np.full((count, width), -1)
    for i, group in enumerate(groups):
        # Group i is done by device i modulo D, as its i // D-th.
        place[i % devices * (count // devices) + i // devices, : len(group)] = group

    def laid(x, fill=0):
        found = np.full((*place.shape, *x.shape[1:]), fill, x.dtype)
        found[place >= 0] = x[place[place >= 0]]
        return found

    return Cohort(laid(cohort.clients, total), *(laid(x) for x in cohort[1:]))


def _walk(rows: np.ndarray, start: int, stop: int, seed: int, client: int) -> np.ndarray:
    """Places start..stop of the endless walk through shuffled epochs of a client's rows."""
    n = len(rows)
    first = start // n
    epochs = [
        stream(seed, "local shuffling", client, epoch).permutation(rows)
        for epoch in range(first, -(-stop // n))
    ]
    return np.concatenate(epochs)[start - first * n : stop - first * n]
