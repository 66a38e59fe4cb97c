"""Training, centralised and federated: the same call."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedrag_jax.clock import Clock
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.callbacks import Callback, FitState, ending
from fedrag_jax.federated.engine.client import update_key
from fedrag_jax.federated.engine.cohort import (
    Cohort,
    draw_clients,
    grouped,
    padding,
    sample_cohort,
)
from fedrag_jax.federated.engine.group_size import choose_group_size
from fedrag_jax.federated.engine.placement import Placing, put_rows, rows_of
from fedrag_jax.federated.engine.records import Spent, by_client, require_finite, seen, summary
from fedrag_jax.federated.engine.round import Ran, Round, run_alone
from fedrag_jax.federated.engine.start import all_rows, initial_state, schedule, started
from fedrag_jax.federated.engine.table import collate, retrieve, used_rows, warn_of_idle_clients
from fedrag_jax.objectives.task import Task


class FitResult(NamedTuple):
    """The result of `fit`: trained parameters, and a record of every round.

    Attributes:
      trainable: trained pytree of the task; stacked [N, ...] if each client has its own model.
      history: records as `fit` describes them.
      frozen: frozen pytree of the task, with the changes of an algorithm that adds to the base.
    """

    trainable: PyTree
    history: list[dict[str, Any]]
    frozen: PyTree


@run_alone
def fit(
    task: Task,
    data: Sequence[Any] | Partition,
    algorithm: Algorithm | None = None,
    *,
    rounds: int = 10,
    batch_size: int = 8,
    optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
    group_size: int | None = 1,
    seed: int = 0,
    refresh_every: int = 1,
    table_rows: int = 0,
    callbacks: Iterable[Callback] = (),
    mesh: Mesh | None = None,
    time_aggregation: bool = False,
    debug: bool = False,
) -> Generator[Round, Ran, FitResult]:
    """Trains a task on pooled examples or on the examples of many clients.

        fit(task, examples)                                                      # centralised
        fit(task, partition(examples, dirichlet(0.1, clients=32)), fed_avg())    # federated

    Args:
      data: a list of examples (one client holds all of them) or a `Partition`.
      algorithm: `fed_avg(...)`, `local_only(...)`, ...; optional for a list of examples.
      rounds: number of rounds.
      batch_size: B, examples per local step.
      optimizer: the clients' optimizer; default: AdamW at 1e-3. A schedule is a function of the round
        (from 0) that returns an optimizer; optimizers from `tunable` share a compiled program.
      group_size: g, clients trained side by side; it affects memory and speed, not the result. None
        measures the fastest number once per device; a resumed run keeps its value.
      seed: seed of client sampling, local shuffling and the keys passed to the loss.
      refresh_every: rounds between two retrievals, for a task that has `retrieve`.
      table_rows: minimum number of rows of the table of examples (padded), so that fits with different
        numbers of examples share a compiled program.
      callbacks: called after every round, in order; a callback that restores a state must be first.
        Each of them can end the fit early.
      mesh: a mesh with an axis "clients", whose devices share the groups of a round. On several hosts
        (`jax.distributed`) every process makes the same call.
      time_aggregation: run the first round twice more without local steps, on a copy of the state, to
        measure the time outside local steps.
      debug: loop over clients and steps in Python; errors name client, step and batch.

    Returns:
      `FitResult`. A record holds `round` (from 1), `rounds`, `loss` and `metrics` (means over the
      examples of the round), `clients` [K] and their `client_loss` [K], `drawn` (number of sampled
      clients, of which K answered), `examples` (number seen since the start), `padding` (share of
      computed rows that are not examples), `bytes_down` and `bytes_up` of the round, `traffic` (the
      same by part and type), `peak_bytes` on a device, `device_seconds` (seconds of the round times
      the number of devices), `refreshed` (whether there was a new retrieval), `seconds` of training,
      `refresh_seconds` of retrieval and collating, and `compile_seconds`. `aggregate_seconds` is the
      part of `seconds` outside local steps (sampling, distribution, aggregation, the server's step; 0
      unless timed). `embed_seconds` and `retrieve_seconds` are the parts of `refresh_seconds` for
      embedding passages and for searching. Robust algorithms add `left_out`, the clients whose updates
      did not count; private algorithms add `epsilon` and `delta`; secure aggregation adds `dropped`.

    Raises:
      ConfigError: an invalid or unsupported setting.
      DataError: no examples, or a table whose rows do not match the examples.
      DivergenceError: a loss or parameter that is not finite; the error names the round and the
        clients. Callbacks have not seen that round.
    """
    counts = {"rounds": rounds, "batch_size": batch_size, "group_size": group_size}
    _require_counts(counts | {"refresh_every": refresh_every})
    data, algorithm, alone = _who_trains(task, data, algorithm)
    algorithm.record_fields(rounds)  # refuses more than it may take
    optimizer_at = schedule(algorithm, optimizer)
    warn_of_idle_clients(task, data, batch_size)
    work, total = algorithm.work, len(data.clients)
    places = max(work.sampling.places(data.sizes()), 1)
    placing = Placing(mesh, task.frozen, places)
    widest = -(-places // placing.devices)  # wider groups would leave devices idle

    settings = {
        "task": task.name,
        "algorithm": algorithm.name,
        "clients": _fingerprint(data),
        "batch_size": batch_size,
        "group_size": group_size and min(group_size, widest),
        "seed": seed,
        "refresh_every": refresh_every,
    }
    callbacks = list(callbacks)
    begun = initial_state(task, algorithm, optimizer_at(0), total)
    begun = begun._replace(population=all_rows(begun.population, total))
    first = FitState(0, begun, None, (), settings)
    with ending(callbacks):
        now = _placed(started(first, algorithm, callbacks, rounds), placing, task.frozen)
        frozen = placing.everywhere(task.frozen)
        key = placing.everywhere(update_key(seed))

        @functools.lru_cache(maxsize=2)  # a round's, and the next one's while the devices are busy
        def cohort_of(round: int) -> tuple[np.ndarray, Cohort]:
            drawn = draw_clients(data.sizes(), work, round, seed)
            return drawn, sample_cohort(data, work, round, batch_size, seed)

        table = idle = None
        rows, place = np.zeros(0, int), np.zeros(0, np.int32)  # of the table, and where each row is
        while now.round < rounds and not any(callback.stopped for callback in callbacks):
            # Retrieve and collate the examples of the coming rounds.
            clock = Clock(task.spent)
            refresh = task.retrieve is not None and now.round % refresh_every == 0
            if refresh or table is None:
                stretch = (now.round - now.round % refresh_every, refresh_every)
                since, count = stretch if task.retrieve is not None else (0, rounds)
                rows = used_rows(data, work, since, count, batch_size, seed, table_rows)
                if refresh:
                    found, index = retrieve(
                        task, data, rows, algorithm, now.state, frozen, now.index
                    )
                    now = dataclasses.replace(now, retrieved=found, index=index)
                table = placing.everywhere(collate(task, data.examples, rows, now.retrieved))
                place = np.zeros(len(data.examples), np.int32)
                place[rows] = np.arange(len(rows))
            refreshing = clock.lap()

            if now.settings["group_size"] is None:
                size = choose_group_size(
                    task, optimizer_at(now.round), frozen, table, batch_size, widest
                )
                now = dataclasses.replace(now, settings=now.settings | {"group_size": size})
            choosing = clock.lap()

            # Sample the clients and lay out their batches.
            drawn, cohort = cohort_of(now.round)
            in_table = cohort._replace(indices=place[cohort.indices])
            parts = grouped(in_table, now.settings["group_size"], data, work, placing.devices)
            population = placing.dealt(rows_of(now.state.population, parts))
            state, groups = now.state._replace(population=population), placing.dealt(parts)
            asked = Round(
                task.loss,
                algorithm.turns[now.round % len(algorithm.turns)],
                optimizer_at(now.round),
                placing.clients,
                (state, frozen, table, groups, np.int32(now.round), key),
                rounds - now.round,
                _namer(data, rows) if debug else None,
                functools.partial(cohort_of, now.round + 1) if now.round + 1 < rounds else None,
            )
            sampling = clock.lap()

            ran = yield asked
            if idle is None and time_aggregation:
                idle = yield from _idle_seconds(asked, ran.state)
            clock.lap()  # others may have had their turn

            # Read the result and write the record.
            left = placing.read((ran.state.population, ran.outcome))
            population, (report, server_finite) = left
            spent = Spent(refreshing, choosing, sampling.others, ran, sum(clock.lap()), idle)
            clients, report = by_client(report, parts, total)
            require_finite(task.name, now.round + 1, clients, report["finite"], server_finite)
            put_rows(now.state.population, parts, population)
            answered = clients[~report.get("dropped", np.zeros(len(clients), bool))]
            traffic = algorithm.traffic(ran.state.trainable, drawn, answered, now.round)
            record = {"round": now.round + 1, "rounds": rounds, **summary(clients, report)}
            record |= {
                "drawn": len(drawn),
                "examples": seen(now.history) + int(report["examples"].sum()),
                "padding": padding(parts),
                "bytes_down": sum(traffic.down.values()),
                "bytes_up": sum(traffic.up.values()),
                "traffic": traffic._asdict(),
                "refreshed": refresh,
                **spent.record(),
                **algorithm.record_fields(now.round + 1),
            }
            now = dataclasses.replace(
                now,
                round=now.round + 1,
                state=ran.state._replace(population=now.state.population),
                history=(*now.history, record),
            )
            if any([callback.round_end(now, record) for callback in callbacks]):  # all are told
                break

    trainable = now.state.trainable
    if algorithm.model is not None:
        trainable = jax.vmap(algorithm.model, (None, 0))(trainable, now.state.population)
        if alone:
            trainable = jax.tree.map(lambda x: x[0], trainable)
    return FitResult(trainable, list(now.history), algorithm.frozen(now.state, frozen))


def _require_counts(counts: dict[str, int | None]) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"fit: {name} must be at least 1, got {value}")


def _who_trains(task, data, algorithm) -> tuple[Partition, Algorithm, bool]:
    """Returns the clients, the algorithm, and whether a plain list of examples was given."""
    alone = not isinstance(data, Partition)
    if alone:
        if len(data) == 0:
            raise DataError(f"fit: no examples for training {task.name!r}; give at least one")
        data = Partition(data, (np.arange(len(data)),))
    if algorithm is None:
        if not alone:
            raise ConfigError(
                f"fit: name an algorithm for {len(data.clients)} clients, such as fed_avg()"
            )
        algorithm = centralised()
    if algorithm.model is not None and task.index is not None:
        raise ConfigError(
            f"fit: {algorithm.name} leaves a separate model with each client, but {task.name!r} keeps "
            "one index for all; refresh the index every time, or train one shared model"
        )
    return data, algorithm, alone


def _placed(now: FitState, placing: Placing, frozen: PyTree) -> FitState:
    """Puts the state on every device, except for the population, which stays on the host, and for
    changes of a base that is split over devices."""
    server = placing.beside(now.state.server, frozen)
    state = placing.everywhere(now.state._replace(server=server, population=()))
    return dataclasses.replace(now, state=state._replace(population=now.state.population))


def _idle_seconds(asked: Round, state: State) -> Generator[Round, Ran, float]:
    """Returns the seconds of the round without local steps, the faster of two runs."""
    first = yield _without_steps(asked, state)
    second = yield _without_steps(asked, state)
    return min(first.seconds, second.seconds)


def _without_steps(asked: Round, state: State) -> Round:
    """Returns the same round without local steps: distribution, aggregation, and the server's step."""
    _, frozen, table, cohort, *rest = asked.arguments
    state = jax.tree.map(jnp.copy, state)  # for it is donated
    cohort = [part._replace(steps=part.steps * 0) for part in cohort]
    return asked._replace(arguments=(state, frozen, table, cohort, *rest), left=0, meanwhile=None)


def _namer(data: Partition, rows: np.ndarray) -> Callable[[int], str]:
    """Returns a function that names a row of the table: the example's number, and its id if any."""

    def name(row):
        example = data.examples[rows[row]]
        known = example.get("id") if isinstance(example, Mapping) else getattr(example, "id", None)
        return f"example {rows[row]}" + ("" if known is None else f" ({known})")

    return name


def _fingerprint(data: Partition) -> str:
    """Returns the number of clients, and a hash of their examples."""
    digest = hashlib.sha256()
    for rows in data.clients:
        digest.update(np.asarray(rows, np.int64).tobytes() + b"/")
    return f"{len(data.clients)}:{digest.hexdigest()[:16]}"
