"""Who trains in a round, on which examples, in which order.

Everything here is a function of (seed, round, client): the same whatever the group size or the number
of devices, and the same again in a resumed run.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.data.partition import Partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.federated.sampling import everyone
from fedrag_jax.federated.work import Work

MAX_PADDING = 0.1  # of a batch, on average: beyond it there are smaller batches too
MAX_IDLE = 0.05  # of the steps of a group: beyond it there are smaller groups too
CLIENTS = "clients"  # the mesh axis that groups are dealt out over


class Cohort(NamedTuple):
    """Clients of a round: K of them, at most S local steps each, batches of B.

    Attributes:
      clients: int32 [K] numbers; one past the last client marks padding.
      share: float [K] weight p_k of its update; the weights sum to 1; 0 for padding.
      steps: int32 [K] number of steps that each takes, at most S.
      indices: int32 [K, S, B] rows of the table.
      example_weight: float32 [K, S, B] 0 for rows that only fill up to B.
      memory: what changes of updates keep for these clients, by name; see `updates.changing`. Empty
        until a round begins.
    """

    clients: np.ndarray
    share: np.ndarray
    steps: np.ndarray
    indices: np.ndarray
    example_weight: np.ndarray
    memory: Mapping[str, Any] = {}


def draw_clients(sizes: np.ndarray, work: Work, round: int, seed: int) -> np.ndarray:
    """Clients that receive the model, in ascending order."""
    return np.sort(work.sampling.draw(sizes, stream(seed, "client sampling", round)))


def sample_cohort(data: Partition, work: Work, round: int, batch_size: int, seed: int) -> Cohort:
    """Draws clients, in ascending order, lets some drop out, and lays out the batches of the others.

    Args:
      round: from 0.

    Returns:
      `Cohort`. With `local_steps` a client walks through shuffled epochs of its own examples: S
      batches, all full unless it holds fewer than B. A client that missed rounds continues as if it had
      taken part in all of them.
      With `local_epochs` it makes whole passes, the last batch of each filled up; S is that of the
      largest client, drawn or not, so that all rounds have one shape.
    """
    sizes = data.sizes()
    clients = draw_clients(sizes, work, round, seed)
    if work.dropout:
        answers = [stream(seed, "dropout", round, c).random() >= work.dropout for c in clients]
        clients = clients[np.array(answers, bool)]
    shape = (len(clients), steps_of(int(sizes.max()), work, batch_size), batch_size)
    indices, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    done = np.zeros(len(clients), np.int64)
    for k, client in enumerate(clients):
        mine = client_batches(data.clients[client], client, work, round, batch_size, seed)
        taken = slice(len(mine.indices))
        indices[k, taken], weight[k, taken], done[k] = mine.indices, mine.example_weight, mine.steps
    counts = sizes[clients] if work.weighting == "examples" else np.ones(len(clients))
    return Cohort(
        clients=clients.astype(np.int32),
        share=counts / max(counts.sum(), 1),  # nobody may have answered
        steps=done.astype(np.int32),
        indices=indices,
        example_weight=weight,
    )


def steps_of(size: int, work: Work, batch_size: int) -> int:
    """Returns S, the steps per round of a client with `size` examples that is not a straggler."""
    if work.local_epochs is None:
        return work.local_steps
    return work.local_epochs * -(-size // batch_size)


class Batches(NamedTuple):
    """The batches of one client in a round: `steps` of S batches of B, as in `Cohort`."""

    steps: int
    indices: np.ndarray
    example_weight: np.ndarray


def client_batches(
    rows: np.ndarray, client: int, work: Work, round: int, batch_size: int, seed: int
) -> Batches:
    """Returns the batches of one client; they do not depend on other clients.

    Args:
      rows: of the table, those the client holds.
      client: its number.
      round: from 0.
    """
    steps = steps_of(len(rows), work, batch_size)
    indices = np.zeros((steps, batch_size), np.int32)
    weight = np.zeros((steps, batch_size), np.float32)
    if work.local_epochs is None:
        width = min(batch_size, len(rows))
        start = round * steps * width
        walked = _walk(rows, start, start + steps * width, seed, client)
        indices[:, :width] = walked.reshape(steps, width)
        weight[:, :width] = 1
    else:
        per_epoch = -(-len(rows) // batch_size)
        for e in range(work.local_epochs):
            start = (round * work.local_epochs + e) * len(rows)
            here = slice(e * per_epoch, (e + 1) * per_epoch)
            flat = np.zeros((2, per_epoch * batch_size))
            flat[0, : len(rows)] = _walk(rows, start, start + len(rows), seed, client)
            flat[1, : len(rows)] = 1
            indices[here], weight[here] = flat.reshape(2, per_epoch, batch_size)
    rng = stream(seed, "stragglers", round, client) if work.stragglers else None
    if rng is not None and rng.random() < work.stragglers:
        steps = int(rng.integers(1, steps + 1))
        weight[steps:] = 0
    return Batches(steps, indices, weight)


def grouped(
    cohort: Cohort, group_size: int, data: Partition, work: Work, devices: int = 1
) -> list[Cohort]:
    """Returns the cohort as parts of [G, g, ...] with little padding.

    A group runs as many steps as its busiest client, so clients with similar numbers of steps are
    grouped. If clients differ in that, there are parts with smaller groups (`group_size`, an eighth of
    it and so on down to 1), and a group is as large as padding allows. If many clients hold less than a
    batch, there are parts with smaller batches (a half, a quarter and so on).

    All rounds have the same parts, with room for all clients; empty groups take no steps. G is a
    multiple of the number of devices, each of which gets consecutive groups.
    """
    sizes, batch_size = data.sizes(), cohort.indices.shape[-1]
    room = max(work.sampling.places(sizes), len(cohort.clients))
    lanes = [group_size]
    if work.local_epochs is not None or work.stragglers:
        while lanes[-1] > 1:
            lanes.append(max(lanes[-1] // 8, 1))
    rows = _batch_rows(sizes, batch_size, work)
    need = rows[np.searchsorted(rows, np.minimum(sizes[cohort.clients], batch_size))]
    parts, always_all = [], work.sampling == everyone and not (work.dropout or work.stragglers)
    for b in reversed(rows):
        order = np.flatnonzero(need == b)
        order = order[np.argsort(-cohort.steps[order], kind="stable")]
        groups = {g: [] for g in lanes}
        while order.size:
            g = next(g for g in lanes if g == lanes[-1] or _fits(cohort.steps[order[:g]], g))
            groups[g].append(order[:g])
            order = order[g:]
        narrow = cohort._replace(
            indices=cohort.indices[..., :b], example_weight=cohort.example_weight[..., :b]
        )
        for g in lanes:
            if groups[g] or not always_all:
                parts.append(_part(narrow, groups[g], g, room, devices, len(sizes)))
    return parts


def padding(parts: list[Cohort]) -> float:
    """Returns the share of computed rows that are not examples, from 0 to 1."""
    computed = sum(p.steps.max(1).sum() * p.steps.shape[1] * p.indices.shape[-1] for p in parts)
    real = sum((p.example_weight > 0).sum() for p in parts)
    return float(1 - real / computed) if computed else 0.0


def _batch_rows(sizes: np.ndarray, batch_size: int, work: Work) -> np.ndarray:
    """Rows of the batches there are to be, ascending: B, and halves of it while padding is much."""
    rows = [batch_size]
    # What a client does with all it holds, and what it does in a step if it holds less than that.
    real = sizes if work.local_epochs is not None else np.minimum(sizes, batch_size)
    while rows[0] > 1:
        small = np.array(rows)[np.searchsorted(rows, np.minimum(real, batch_size))]
        computed = np.where(real > batch_size, -(-real // batch_size) * batch_size, small)
        if real.sum() >= (1 - MAX_PADDING) * computed.sum() or not (real <= rows[0] // 2).any():
            break
        rows.insert(0, rows[0] // 2)
    return np.array(rows)


def _fits(steps: np.ndarray, lanes: int) -> bool:
    """Whether clients with these numbers of steps fill a group of `lanes` lanes well."""
    return steps.sum() >= (1 - MAX_IDLE) * lanes * steps.max()


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

    return Cohort(laid(cohort.clients, total), *(laid(x) for x in cohort[1:5]))


def _walk(rows: np.ndarray, start: int, stop: int, seed: int, client: int) -> np.ndarray:
    """Places start..stop of the endless walk through shuffled epochs of a client's rows."""
    n = len(rows)
    first = start // n
    epochs = [
        stream(seed, "local shuffling", client, epoch).permutation(rows)
        for epoch in range(first, -(-stop // n))
    ]
    return np.concatenate(epochs)[start - first * n : stop - first * n]
