"""The work of clients step by step in Python, to see which client, step and batch fails.

The same numbers as the compiled round, slowly; under `jax.disable_jit()` a debugger can stop inside a
loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import DivergenceError
from fedrag_jax.federated.algorithm import Client
from fedrag_jax.federated.engine.client import all_finite, flat_rows, one_step, report_of


def debug_round(loss, turn, optimizer, name_of, state, frozen, table, cohort, round, key):
    """Runs a round like `compile_round`, in Python; `name_of(row)` names a row of the table."""
    key = jax.random.fold_in(key, round)
    client = step_by_step(loss, optimizer, frozen, table, key, name_of)
    state, report = turn(state, cohort, client)
    return state, (report, all_finite((state.trainable, state.server)))


def step_by_step(loss, optimizer, frozen, table, key, name_of: Callable[[int], str]) -> Client:
    """A `Client` whose clients, steps and groups are loops in Python; see `local_update`.

    Args:
      name_of: function that names a row of the table in messages.

    Returns:
      A `Client`. Where a step raises, the error gets a note; where a step leaves a number that is not
      finite, it raises DivergenceError. Both name client, step and batch.
    """

    def update(x, state, members, own=(), correct=None, see=None, frozen=frozen):
        step = jax.jit(one_step(loss, optimizer, frozen, table, correct, see))
        done = [
            _one(step, key, *jax.tree.map(lambda a, i=i: a[i], (x, state, members, own)), name_of)
            for i in range(len(members.clients))
        ]
        y, state, sums = jax.tree.map(lambda *rows: jnp.stack(rows), *done)
        return y, state, report_of(y, *sums)

    def total(work, *inputs):
        sums, rest = [], []
        for part in zip(*inputs, strict=True):
            groups = len(jax.tree.leaves(part)[0])
            done = [work(*jax.tree.map(lambda a, g=g: a[g], part)) for g in range(groups)]
            sums += [found for found, _ in done]
            rest.append(jax.tree.map(lambda *rows: jnp.stack(rows), *(left for _, left in done)))
        return jax.tree.map(lambda *parts: sum(parts), *sums), rest

    return Client(jax.vmap(optimizer.init), update, total, flat_rows, frozen, key)


def _one(step, key, x, state, member, own, name_of):
    """The steps of one client: (model, optimizer state, sums)."""
    inputs = jax.random.fold_in(key, member.clients), member, x, own
    y, sums = x, None
    for number in range(int(member.steps)):
        rows = np.asarray(member.indices[number])[np.asarray(member.example_weight[number]) > 0]
        batch = ", ".join(map(name_of, rows.tolist()))
        where = f"client {int(member.clients)}, step {number}, batch of {batch}"
        try:
            y, state, seen = step(number, inputs, y, state)
        except Exception as error:
            error.add_note(f"in {where}")
            raise
        if not all_finite((y, seen[1])):
            what = "the loss is" if not all_finite(seen[1]) else "parameters after the update are"
            raise DivergenceError(
                f"{where}: {what} not finite; look at these examples, or lower the learning rate"
            )
        sums = seen if sums is None else jax.tree.map(jnp.add, sums, seen)
    if sums is None:  # a client that only fills up a group
        shapes = jax.eval_shape(step, 0, inputs, x, state)[2]
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return y, state, sums
