"""What becomes of a client's update between its training and the algorithm: compression, attacks.

An algorithm asks `Client.update` for a client's model y_k. A change stands between the two, and the
algorithm sees x_k + change(y_k − x_k) instead. Of changes around changes, the outermost is the nearest
to the client.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Protocol

import jax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State, Turn, difference, wide


class Change(Protocol):
    """One client's update, changed."""

    def __call__(
        self, update: PyTree, memory: PyTree, client: jax.Array, key: jax.Array, /
    ) -> tuple[PyTree, PyTree]:
        """What is seen instead, in the same shapes, and what the client keeps for its next round.

        Args:
          memory: what it kept; () if changes of this kind keep nothing.
          client: int32 scalar, its number.
          key: of this change, round and client.
        """


def changing(
    algorithm: Algorithm,
    label: str,
    change: Change,
    memory: Callable[[PyTree], PyTree] | None = None,
) -> Algorithm:
    """The algorithm over changed updates.

    Args:
      label: of this kind of change; keys are folded in by it.
      change: equal ones share compiled programs.
      memory: `memory(trainable)`, what a client keeps before its first round.

    Raises:
      ConfigError: no updates are sent.
    """
    if algorithm.needs == "nothing" or algorithm.model is not None:
        raise ConfigError(
            f"{label}: {algorithm.name} leaves models with its clients; wrap an algorithm that makes "
            "one model of what all send, such as fed_avg()"
        )

    def init(trainable, client_init, client_count):
        state = algorithm.init(trainable, client_init, client_count)
        if memory is None:
            return state
        kept = {"inner": state.population, label: memory(state.trainable)}
        return state._replace(population=kept)

    turns = tuple(_turn(turn, label, change, memory is not None) for turn in algorithm.turns)
    return algorithm._replace(init=init, turns=turns)


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
    """That of a change to the update of one client, of the key of the round."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(label.encode())), client)


def _without(report: dict, label: str) -> dict:
    others = {name: kept for name, kept in report["memory"].items() if name != label}
    told = {name: x for name, x in report.items() if name != "memory"}
    return told | ({"memory": others} if others else {})
