"""What an algorithm is, and the few moves that all of them make with stacked pytrees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class State(NamedTuple):
    """What passes from one round to the next.

    Attributes:
      trainable: the global model, or [K, ...] models of an algorithm that keeps one per client.
      optimizer: optimizer states of the clients [K, ...], or () if they start fresh every round.
      server: state of the server optimizer, or ().
    """

    trainable: PyTree
    optimizer: PyTree = ()
    server: PyTree = ()


class Client(NamedTuple):
    """The local work of g clients side by side; every array has a leading axis g.

    Attributes:
      init: `init(trainable) -> optimizer state`.
      update: `update(trainable, optimizer state, members) -> (trainable, optimizer state, report)`
        where `members` is a `Cohort` of g clients and the report holds `loss`, `examples`, `finite`
        and `metrics`, each [g].
    """

    init: Callable
    update: Callable


class Algorithm(NamedTuple):
    """How many clients' updates become one: pure functions and the settings of the cohort.

    Attributes:
      name: with the settings that matter to a resumed run.
      local_steps: S; unused where `local_epochs` is set.
      local_epochs: passes over each client's own examples, or None.
      clients_per_round: how many are drawn each round, or None for all.
      personal: whether each client keeps a model of its own.
      init: `init(trainable, client_count, client_init) -> State`.
      apply: `apply(state, cohort, client) -> (state, report)`, one round. Cohort and report are
        [G, g, ...]: G groups one after another, g clients of a group side by side.
    """

    name: str
    local_steps: int
    local_epochs: int | None
    clients_per_round: int | None
    personal: bool
    init: Callable
    apply: Callable


def stack(tree: PyTree, size: int) -> PyTree:
    """`size` copies along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)


def take(tree: PyTree, clients: jax.Array) -> PyTree:
    """Rows `clients` [g] of every leaf [K, ...]; any row will do for a padding client."""
    return jax.tree.map(lambda x: x.at[clients].get(mode="clip"), tree)


def put(tree: PyTree, clients: jax.Array, rows: PyTree) -> PyTree:
    """`tree` with those rows replaced; padding clients, numbered K, write nothing."""
    return jax.tree.map(lambda x, y: x.at[clients].set(y, mode="drop"), tree, rows)


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32 at least, for sums over many terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
