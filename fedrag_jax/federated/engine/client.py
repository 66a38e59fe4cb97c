"""The local update of clients: a loop over their steps, compiled."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.data.seeds import key_of
from fedrag_jax.federated.algorithm import Client, PyTree, wide
from fedrag_jax.federated.engine.cohort import Cohort


def update_key(seed: int) -> jax.Array:
    """The key of local updates, into which round, client and step are folded."""
    return jax.random.fold_in(key_of(seed), zlib.crc32(b"local update"))


def local_update(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    frozen: PyTree,
    table: dict[str, jax.Array],
    key: jax.Array,
    axis: str | None = None,
) -> Client:
    """Binds a task's loss and data to the local work of clients.

    Args:
      loss: of a `Task`; no gradient is taken for `frozen`.
      table: {name: [N, ...]}; a step gathers its rows from here, so nothing is copied per client.
      key: of the round; client and step are folded in.
      axis: of the mesh, over whose devices the groups are dealt out, or None.

    Returns:
      `Client`, vectorised over the g members of a group; `frozen` and `table` are shared.
    """

    def update(x, state, members: Cohort, own=(), correct=None, see=None, frozen=frozen):
        # Inlined functions of their own are traced once, for their shapes and for the loop.
        step = one_step(loss, optimizer, frozen, table, correct, see)
        step = jax.jit(step, inline=True)
        keys = jax.vmap(lambda client: jax.random.fold_in(key, client))(members.clients)
        inputs = keys, members, x, own
        alone = len(members.clients) == 1
        first = jax.tree.map(lambda x: x[0], (inputs, x, state))
        shapes = jax.eval_shape(step, jnp.int32(0), *first)[2]
        sums = jax.tree.map(lambda s: jnp.zeros((len(members.clients), *s.shape), s.dtype), shapes)

        def grouped(number, carry):
            y, state, sums = carry
            new = jax.vmap(step, (None, 0, 0, 0))(number, inputs, y, state)
            new = *new[:2], jax.tree.map(jnp.add, sums, new[2])
            # A client that is done stays as it is, whatever a step of padding makes of it.
            active = number < members.steps
            return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(active, a, b), new, carry)

        def single(number, carry):
            # A group of one is no batch, which on a CPU saves an eighth of the time.
            y, state, sums = carry
            *new, seen = step(number, first[0], y, state)
            return *new, jax.tree.map(jnp.add, sums, seen)

        carry = (x, state, sums)
        if alone:
            carry = jax.tree.map(lambda x: x[0], carry)
        steps = members.steps.max()
        y, state, sums = jax.lax.fori_loop(jnp.int32(0), steps, single if alone else grouped, carry)
        if alone:
            y, state, sums = jax.tree.map(lambda x: x[None], (y, state, sums))
        return y, state, report_of(y, *sums)

    def total(work, *inputs):
        work = jax.jit(work, inline=True)

        def over_groups(*part):
            def group(sums, inputs):
                found, rest = work(*inputs)
                return jax.tree.map(jnp.add, sums, found), rest

            first = jax.tree.map(lambda x: x[0], part)
            shapes, _ = jax.eval_shape(work, *first)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            sums, rest = jax.lax.scan(group, zero, part)
            return sums, rest

        sums, rest = zip(*(over_groups(*part) for part in zip(*inputs, strict=True)), strict=True)
        sums = jax.tree.map(lambda *parts: sum(parts), *sums)
        return (sums if axis is None else jax.lax.psum(sums, axis)), list(rest)

    def gather(rest):
        rows = flat_rows(rest)
        if axis is None:
            return rows
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), rows)

    return Client(jax.vmap(optimizer.init), update, total, gather, frozen, key)


def flat_rows(rest: list[PyTree]) -> PyTree:
    """Leaves [G, g, ...] of several parts, as [K, ...] of all."""
    flat = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part) for part in rest]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)


def one_step(loss, optimizer, frozen, table, correct=None, see=None) -> Callable:
    """`step(number, (key, member, x, own), y, state) -> (y, state, sums)` of one client.

    The sums are `(examples, examples * loss, {name: examples * metric})`.
    """

    def step(number, inputs, y, state):
        key, member, x, own = inputs
        weight = member.example_weight[number]
        rows = member.indices[number]
        batch = {name: column[rows] for name, column in table.items()} | {"weight": weight}

        of_y = loss if see is None else through(loss, lambda y: see(y, own))
        (value, metrics), gradient = jax.value_and_grad(of_y, has_aux=True)(
            y, frozen, batch, jax.random.fold_in(key, number)
        )
        if correct is not None:
            gradient = correct(gradient, y, x, own)
        updates, state = optimizer.update(gradient, state, y)
        told = jax.tree.map(lambda x: wide(jnp.asarray(x)), (value, metrics))
        count = weight.sum()
        sums = jax.tree.map(lambda x: count.astype(x.dtype) * x, told)
        return optax.apply_updates(y, updates), state, (count, *sums)

    return step


def through(loss: Callable, see: Callable) -> Callable:
    """Returns the loss of what a client trains, from which `see` makes the loss's parameters.

    A loss that clips gradients has a method `through` for that, because it has to clip those of what
    is trained.
    """
    if hasattr(loss, "through"):
        return loss.through(see)
    return lambda y, *rest: loss(see(y), *rest)


def report_of(y: PyTree, examples: jax.Array, loss: jax.Array, metrics: dict) -> dict:
    """Returns the report on g clients, from their models and sums, each [g, ...]."""
    seen = jnp.maximum(examples, 1)
    loss, metrics = jax.tree.map(lambda x: x / seen.astype(x.dtype), (loss, metrics))
    return {
        "loss": loss,
        "metrics": metrics,
        "examples": examples,
        "finite": jax.vmap(all_finite)((loss, y)),
    }


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of every leaf is finite; bool scalar."""
    return jnp.array([True, *map(_finite, jax.tree.leaves(tree))]).all()


def _finite(x) -> jax.Array:
    # Zero times a finite number is zero, and a product is on CPUs fifteen times as fast as `all`.
    x = jnp.atleast_1d(x)
    zeros = jax.lax.optimization_barrier(jnp.zeros(x.shape[-1], x.dtype))
    return jnp.isfinite(x @ zeros).all()
