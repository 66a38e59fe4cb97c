"""A round as one program, compiled ahead of time and kept for every fit with the same shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from fedrag_jax.federated.algorithm import State
from fedrag_jax.federated.client import all_finite, local_update
from fedrag_jax.federated.cohort import CLIENTS
from fedrag_jax.federated.optimizers import join, split


def compile_round(
    loss: Callable,
    turn: Callable,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    *arguments: Any,
) -> Callable:
    """Compiles a round, or finds it compiled.

    Args:
      loss: of a `Task`, hashable; equal losses share programs.
      turn: of an `Algorithm`.
      mesh: with an axis "clients", or None.
      arguments: `state, frozen, table, cohort, round, key` as in the calls to come.

    Returns:
      `run(*arguments) -> (state, report)`; `state` is donated. The report is as the turn gives it, with
      `server_finite` beside it: `(report, server_finite)`.
    """
    fixed, numbers, structure = split(optimizer)
    leaves, tree = jax.tree.flatten((numbers, arguments))
    program = _compile(loss, turn, mesh, fixed, structure, tree, tuple(map(_shape, leaves)))
    return functools.partial(program, numbers)


@functools.lru_cache(maxsize=32)
def _compile(loss, turn, mesh, fixed, structure, tree, shapes):
    def run(numbers, state, frozen, table, cohort, round, key):
        optimizer, axis = join(fixed, numbers, structure), None if mesh is None else CLIENTS
        client = local_update(loss, optimizer, frozen, table, jax.random.fold_in(key, round), axis)
        state, report = turn(state, cohort, client)
        return state, (report, all_finite((state.trainable, state.server)))

    def placed(*inputs):
        # Each device does the groups dealt to it and, like the others, the server's part.
        one, each = PartitionSpec(), PartitionSpec(CLIENTS)
        state = State(one, one, each)
        shared = (
            run
            if mesh is None
            else jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(one, state, one, one, each, one, one),
                out_specs=(state, (each, one)),
                axis_names={CLIENTS},
                check_vma=False,
            )
        )
        state, told = shared(*inputs)
        return jax.tree.map(_placed, state, arguments[0]), told  # the next round is this program

    numbers, arguments = jax.tree.unflatten(tree, shapes)
    return jax.jit(placed, donate_argnums=1).lower(numbers, *arguments).compile()


def _placed(x, shape):
    return x if shape.sharding is None else jax.lax.with_sharding_constraint(x, shape.sharding)


def _shape(x) -> jax.ShapeDtypeStruct:
    """Shape, type and, where somebody chose it, place."""
    aval = jax.typeof(x)
    placed = isinstance(x, jax.Array) and x.committed
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=x.sharding if placed else None
    )
