"""Changes to a client's update between its training and the algorithm: compression, attacks.

An algorithm calls `Client.update` for a client's model y_k. With a change, the algorithm sees
x_k + change(y_k − x_k) instead. If several changes are nested, the outermost is applied first, next to
the client.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Protocol

import jax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State, Turn, difference, wide


class Change(Protocol):
    """Changes one client's update."""

    def __call__(
        self, update: PyTree, memory: PyTree, client: jax.Array, key: jax.Array, /
    ) -> tuple[PyTree, PyTree]:
        """Returns the changed update, in the same shapes, and the client's memory for its next round.

        Args:
          memory: the client's memory; () if changes of this kind have none.
          client: int32 scalar, the client's number.
          key: random key of this change, round and client.
        """


def changing(
    algorithm: Algorithm,
    label: str,
    change: Change,
    memory: Callable[[PyTree], PyTree] | None = None,
) -> Algorithm:
    """Returns the algorithm with changed updates.

    Args:
      label: name of this kind of change, folded into its random keys.
      change: the change; equal changes share compiled programs.
      memory: `memory(trainable)`: a client's memory before its first round.

    Raises:
      ConfigError: the algorithm sends no updates.
    """
    require_one_model(label, algorithm)

    def init(trainable, client_init, client_count):
        state = algorithm.init(trainable, client_init, client_count)
        if memory is None:
            return state
        kept = {"inner": state.population, label: memory(state.trainable)}
        return state._replace(population=kept)

    turns = tuple(_turn(turn, label, change, memory is not None) for turn in algorithm.turns)
    return algorithm._replace(init=init, turns=turns)


def require_one_model(where: str, algorithm: Algorithm) -> None:
    """Raises ConfigError if the algorithm leaves a model with each client."""
    if algorithm.needs == "nothing" or algorithm.model is not None:
        raise ConfigError(
            f"{where}: {algorithm.name} leaves a model with each client; use an algorithm that "
            "combines all updates into one model, such as fed_avg()"
        )


@functools.cache  # algorithms that share a turn share the changed one
def _turn(turn: Turn, label: str, change: Change, keeps: bool) -> Turn:
    def changed(state, cohort, client):
        def update(x, optimizer, members, *own, **corrections):
            y, optimizer, report = client.update(x, optimizer, members, *own, **corrections)
            keys = jax.vmap(lambda k: change_key(client.key, label, k))(members.clients)
            kept = members.memory.get(label, ())
            seen, kept = jax.vmap(change)(difference(y, x), kept, members.clients, keys)
            y = jax.tree.map(lambda x, u: wide(x) + u, x, seen)
            if keeps:
                report = report | {"memory": report.get("memory", {}) | {label: kept}}
            return y, optimizer, report

        if not keeps:
            return turn(state, cohort, client._replace(update=update))
        rows = state.population
        cohort = [
            part._replace(memory={**part.memory, label: row[label]})
            for part, row in zip(cohort, rows, strict=True)
        ]
        inner = state._replace(population=[row["inner"] for row in rows])
        state, report = turn(inner, cohort, client._replace(update=update))
        population = [
            {"inner": row, label: told["memory"][label]}
            for row, told in zip(state.population or [()] * len(cohort), report, strict=True)
        ]
        return State(state.trainable, state.server, population), [
            _without(r, label) for r in report
        ]

    return changed


def change_key(key: jax.Array, label: str, client) -> jax.Array:
    """Returns the key of a change to one client's update, from the key of the round."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(label.encode())), client)


def _without(report: dict, label: str) -> dict:
    others = {name: kept for name, kept in report["memory"].items() if name != label}
    told = {name: x for name, x in report.items() if name != "memory"}
    return told | ({"memory": others} if others else {})
