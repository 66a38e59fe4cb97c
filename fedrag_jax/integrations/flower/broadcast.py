"""Encodes what the server sends in a round, and decodes it at a party.

Without a codec for the way down this is the model. With one, a party that has received all earlier
messages receives the next message; any other party receives the sum of all messages.
"""

import functools
from typing import NamedTuple

import jax

from fedrag_jax.federated.algorithm import PyTree, State
from fedrag_jax.federated.algorithms.compressed import after_message, announced, heard, moved_on
from fedrag_jax.federated.compression.feedback import leaves_of, with_leaves
from fedrag_jax.integrations.flower.plan import Plan


class Handed(NamedTuple):
    """The start of a round.

    Attributes:
      start: the state from which parties start, as the wrapped algorithm defines it.
      whole: arrays for a party that has no earlier messages.
      message: arrays for a party that has all earlier messages; None without a codec.
      received: the sum of all messages, or None.
    """

    start: State
    whole: PyTree
    message: PyTree | None = None
    received: PyTree | None = None


def hand_out(plan: Plan, state: State, round: int) -> Handed:
    """Returns what the server sends in a round, counted from 0."""
    inner = plan.inner(state)
    if plan.down is None:
        return Handed(inner, plan.handed_out(state))
    x = state.trainable
    message, w = _announced(plan.down, x, state.server["received"], plan.key(round))
    start = inner._replace(trainable=heard(x, w))
    others = plan.handed_out(state) | {"trainable": _with(x, w)}
    return Handed(start, others, _message(others, message), w)


def closed(plan: Plan, state: State, handed: Handed, after: State) -> State:
    """Returns the server's state after a round, from the state before and the algorithm's result."""
    if plan.down is None:
        return after
    x = moved_on(state.trainable, handed.start.trainable, after.trainable)
    return State(x, {"inner": after.server, "received": handed.received})


def expected(plan: Plan, whole: bool) -> PyTree:
    """Returns a tree with the shapes and types of the arrays that a party receives."""
    plain = plan.handed_out(plan.initial)
    if plan.down is None:
        return plain
    if whole:
        return plain | {"trainable": nothing_heard(plan)}
    w = plan.initial.server["received"]
    shapes = jax.eval_shape(functools.partial(_announced, plan.down), w, w, plan.key(0))[0]
    return _message(plain, shapes)


def nothing_heard(plan: Plan) -> PyTree:
    """Returns a party's state before the first message: the model, with trained parts in wide types."""
    return _with(plan.initial.trainable, plan.initial.server["received"])


def begun(
    plan: Plan, round: int, handed: PyTree, before: PyTree | None = None
) -> tuple[State, PyTree]:
    """Returns the state from which a party starts a round, and the sum of all messages so far.

    Args:
      handed: the arrays from the server.
      before: the sum of the earlier messages, if `handed` is a message.
    """
    if plan.down is None:
        return plan.received(handed), ()
    server = {name: part for name, part in handed.items() if name == "server"}
    if before is None:
        now = handed["trainable"]
    else:
        w = with_leaves(plan.initial.server["received"], leaves_of(before))
        now = _with(before, after_message(plan.down, handed["message"], w, plan.key(round)))
    start = jax.tree.map(lambda x, like: x.astype(like.dtype), now, plan.initial.trainable)
    return plan.received({"trainable": start} | server), now


@functools.partial(jax.jit, static_argnums=0)
def _announced(codec, x: PyTree, w: PyTree, key) -> tuple[PyTree, PyTree]:
    return announced(codec, x, w, key)


def _with(x: PyTree, w: PyTree) -> PyTree:
    return with_leaves(x, leaves_of(x) | leaves_of(w))


def _message(handed: PyTree, message: PyTree) -> PyTree:
    return {n: part for n, part in handed.items() if n != "trainable"} | {"message": message}
