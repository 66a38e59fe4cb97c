"""Training, centralised and federated: the same call."""

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError, DivergenceError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.callbacks import Callback, FitState
from fedrag_jax.federated.cohort import Cohort, cohort_size, grouped, sample_cohort
from fedrag_jax.federated.local_only import local_only
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.round import compile_round
from fedrag_jax.objectives.task import Task

ADAMW = tunable(optax.adamw, learning_rate=1e-3)


class FitResult(NamedTuple):
    """What was trained, and a record of every round.

    Attributes:
      trainable: as in the task; stacked [K, ...] where a partition was trained by `local_only`.
      history: records as `fit` describes them.
    """

    trainable: PyTree
    history: list[dict[str, Any]]


def fit(
    task: Task,
    data: Sequence[Any] | Partition,
    algorithm: Algorithm | None = None,
    *,
    rounds: int = 10,
    batch_size: int = 8,
    optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
    group_size: int = 1,
    seed: int = 0,
    refresh_every: int = 1,
    table_rows: int = 0,
    callbacks: Iterable[Callback] = (),
) -> FitResult:
    """Trains a task on one pile of examples or on those of many clients.

        fit(task, examples)                                                      # centralised
        fit(task, partition(examples, dirichlet(0.1, clients=32)), fed_avg())    # federated

    Args:
      data: a list of examples (one client holds everything) or a `Partition`.
      algorithm: `fed_avg(...)`, `local_only(...)`; may be left out for a list of examples.
      batch_size: B, examples in a local step.
      optimizer: of the clients; AdamW at 1e-3 unless given. A schedule is a function of the round
        (from 0) that returns one; `tunable` makes those that share a compiled program.
      group_size: g, clients trained side by side; it sets memory and speed, not the result.
      seed: of client sampling, local shuffling and the keys given to the loss.
      refresh_every: rounds between two retrievals, for a task that has `retrieve`.
      table_rows: the table of examples is filled up to so many, for fits on more and fewer examples
        to share a compiled program.
      callbacks: told of every round, in order; one that restores a state comes first.

    Returns:
      `FitResult`. A record holds `round` (from 1), `rounds`, `loss` and `metrics` (means over the
      examples seen), `clients` [K] and their `client_loss` [K], `examples` seen since the start,
      and `seconds` of training, `refresh_seconds` of retrieval and collating, `compile_seconds`.

    Raises:
      ConfigError: a setting that cannot be honoured.
      DataError: no examples, or a table whose rows are not the examples.
      DivergenceError: a loss or parameter that is not finite; names the round and the clients.
        Callbacks have not seen that round.
    """
    counts = {"rounds": rounds, "batch_size": batch_size, "group_size": group_size}
    for name, value in (counts | {"refresh_every": refresh_every}).items():
        if value < 1:
            raise ConfigError(f"fit: {name} must be at least 1, got {value}")
    centralised = not isinstance(data, Partition)
    if centralised:
        if len(data) == 0:
            raise DataError(f"fit: no examples to train {task.name!r} on; give at least one")
        data = Partition(data, (np.arange(len(data)),))
    if algorithm is None:
        if not centralised:
            raise ConfigError(
                f"fit: name an algorithm for {len(data.clients)} clients, such as fed_avg()"
            )
        algorithm = local_only()
    optimizer = ADAMW if optimizer is None else optimizer
    scheduled = not isinstance(optimizer, optax.GradientTransformation)
    at_round = optimizer if scheduled else lambda _: optimizer
    group_size = min(group_size, cohort_size(data, algorithm))

    # Where to start.
    now = FitState(
        round=0,
        state=_initial_state(task, algorithm, at_round(0), len(data.clients)),
        retrieved=None,
        history=(),
        settings={
            "task": task.name,
            "algorithm": algorithm.name,
            "clients": _fingerprint(data),
            "batch_size": batch_size,
            "group_size": group_size,
            "seed": seed,
            "refresh_every": refresh_every,
        },
    )
    callbacks = list(callbacks)
    for i, callback in enumerate(callbacks):
        started, now = now.round, callback.start(now)
        if i > 0 and now.round != started:
            raise ConfigError(
                f"fit: {type(callback).__name__} went to round {now.round} after "
                f"{type(callbacks[0]).__name__} had started at {started}; put it first in callbacks"
            )
    if now.round > rounds:
        raise ConfigError(
            f"fit: the checkpoint is at round {now.round} but rounds={rounds}; raise rounds"
        )

    # Rounds.
    frozen = jax.tree.map(jnp.asarray, task.frozen)
    beside = _beside(frozen)
    now = dataclasses.replace(now, state=beside(now.state))
    key = beside(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"local update")))
    table = None
    while now.round < rounds:
        clock = _Clock()
        refresh = task.retrieve is not None and now.round % refresh_every == 0
        if refresh or table is None:
            first, count = 0, rounds
            if task.retrieve is not None:
                first, count = now.round - now.round % refresh_every, refresh_every
            rows = _used(data, algorithm, first, count, batch_size, seed, table_rows)
            if refresh:
                found = _retrieve(task, data, rows, algorithm, now.state)
                now = dataclasses.replace(now, retrieved=found)
            table = beside(_collate(task, data.examples, rows, now.retrieved))
            place = np.zeros(len(data.examples), np.int32)
            place[rows] = np.arange(len(rows))
        refresh_seconds, compile_seconds = clock.lap()

        cohort = sample_cohort(data, algorithm, now.round, batch_size, seed)
        in_table = cohort._replace(indices=place[cohort.indices])
        groups = beside(grouped(in_table, group_size, len(data.clients)))
        arguments = now.state, frozen, table, groups, np.int32(now.round), key
        sample_seconds, _ = clock.lap()
        run = compile_round(task.loss, algorithm, at_round(now.round), *arguments)
        compile_seconds += sum(clock.lap())
        state, report = run(*arguments)
        report = jax.device_get(report)
        seconds = sample_seconds + sum(clock.lap())

        record = {"round": now.round + 1, "rounds": rounds}
        record |= _summary(report, cohort, now.history)
        record |= {
            "seconds": seconds,
            "refresh_seconds": refresh_seconds,
            "compile_seconds": compile_seconds,
        }
        _require_finite(task, report, cohort, record)
        now = dataclasses.replace(
            now, round=now.round + 1, state=state, history=(*now.history, record)
        )
        for callback in callbacks:
            callback.round_end(now, record)

    trainable = now.state.trainable
    if centralised and algorithm.personal:
        trainable = jax.tree.map(lambda x: x[0], trainable)
    return FitResult(trainable, list(now.history))


def _initial_state(task, algorithm, optimizer, client_count) -> State:
    trainable = jax.tree.map(jnp.asarray, task.trainable)
    state = algorithm.init(trainable, client_count, jax.vmap(optimizer.init))
    # Copies, because the rounds reuse the memory of the state; of fixed types, so that the first
    # round and the second are the same program.
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), state)


def _beside(frozen) -> Callable[[Any], Any]:
    """Puts what is trained or read onto the devices that share the frozen arrays, whole on each."""
    places = (x.sharding for x in jax.tree.leaves(frozen))
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    mesh = next(meshes, None)
    if mesh is None:
        return lambda tree: tree
    return lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _used(data, algorithm, first, count, batch_size, seed, height) -> np.ndarray:
    """Rows that `count` rounds from `first` on train on: nothing is done for the others.

    As many for every stretch of rounds, so that all have one shape: the first fills up.
    """
    rows = np.arange(len(data.examples))
    cohort = sample_cohort(data, algorithm, first, batch_size, seed)
    room = count * cohort.indices.size
    if room < len(rows):
        others = (
            sample_cohort(data, algorithm, first + i, batch_size, seed) for i in range(1, count)
        )
        trained = [c.indices[c.example_weight > 0] for c in (cohort, *others)]
        rows = np.unique(np.concatenate(trained))
    height = max(height, min(room, len(data.examples)))
    return np.pad(rows, (0, height - len(rows)), constant_values=rows[0])


def _retrieve(task: Task, data: Partition, rows, algorithm: Algorithm, state: State) -> np.ndarray:
    """int32 [len(rows), k]: what each example finds with the model that trains on it."""
    rows, inverse = np.unique(rows, return_inverse=True)
    if not algorithm.personal:
        found = task.retrieve([data.examples[i] for i in rows], state.trainable)
        return np.asarray(found)[inverse]
    retrieved: np.ndarray | None = None
    for client, held in enumerate(data.clients):
        own = np.flatnonzero(np.isin(rows, held))
        if not own.size:
            continue
        model = jax.tree.map(lambda x, c=client: x[c], state.trainable)
        found = np.asarray(task.retrieve([data.examples[i] for i in rows[own]], model))
        if retrieved is None:
            retrieved = np.zeros((len(rows), *found.shape[1:]), found.dtype)
        retrieved[own] = found
    return retrieved[inverse]


def _collate(task: Task, examples: Sequence[Any], rows, retrieved) -> dict[str, jax.Array]:
    """The table of `rows`, each of which is collated once however often it is there."""
    rows, index, inverse = np.unique(rows, return_index=True, return_inverse=True)
    found = None if retrieved is None else retrieved[index]
    table = task.collate([examples[i] for i in rows], found)
    for name, column in table.items():
        if name == "weight" or len(column) != len(rows):
            raise DataError(
                f"task {task.name!r}: column {name!r} of the table has shape {np.shape(column)}; "
                f"collate must give one row for each of the {len(rows)} examples, "
                'and leave the name "weight" to fit'
            )
    return jax.device_put({name: np.asarray(column)[inverse] for name, column in table.items()})


def _summary(report, cohort: Cohort, history) -> dict[str, Any]:
    """Means over the examples of a round, and each client's own."""
    size = len(cohort.clients)
    seen = report["examples"].reshape(-1)[:size].astype(np.float64)

    def mean(x):
        return float(np.sum(seen * x.reshape(-1)[:size]) / seen.sum())

    return {
        "loss": mean(report["loss"]),
        "metrics": {name: mean(x) for name, x in report["metrics"].items()},
        "clients": cohort.clients.tolist(),
        "client_loss": report["loss"].reshape(-1)[:size].tolist(),
        "examples": int(seen.sum()) + (history[-1]["examples"] if history else 0),
    }


def _require_finite(task: Task, report, cohort: Cohort, record) -> None:
    finite = report["finite"].reshape(-1)[: len(cohort.clients)]
    if finite.all() and report["server_finite"]:
        return
    who = ", ".join(map(str, cohort.clients[~finite])) if not finite.all() else "none (the server)"
    raise DivergenceError(
        f"task {task.name!r}, round {record['round']}: loss or parameters are not finite; "
        f"client(s): {who}. Lower the learning rate or clip gradients; "
        "the last checkpoint is from before"
    )


def _fingerprint(data: Partition) -> str:
    """How many clients, and a hash of what each holds."""
    digest = hashlib.sha256()
    for rows in data.clients:
        digest.update(np.asarray(rows, np.int64).tobytes() + b"/")
    return f"{len(data.clients)}:{digest.hexdigest()[:16]}"


class _Clock:
    """Seconds between laps, and how many of them JAX compiled."""

    def __init__(self):
        self.last, self.compiled = time.perf_counter(), _compiling.seconds

    def lap(self) -> tuple[float, float]:
        last, compiled = self.last, self.compiled
        self.last, self.compiled = time.perf_counter(), _compiling.seconds
        took = self.last - last
        compiled = min(took, self.compiled - compiled)  # threads may compile side by side
        return took - compiled, compiled


class _Compiling:
    """Seconds JAX has traced and compiled since this module was imported."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


_compiling = _Compiling()
