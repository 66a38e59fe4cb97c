"""What the server hands out in a round, and what a party makes of it.

That is the model, or with a codec for the way down what has changed in it: a party that has all
messages before is sent the next one, and any other what all of them have come to.
"""

import functools
from typing import NamedTuple

import jax

from fedrag_jax.federated.algorithm import PyTree, State
from fedrag_jax.federated.algorithms.compressed import after_message, announced, heard, moved_on
from fedrag_jax.federated.compression.feedback import leaves_of, with_leaves
from fedrag_jax.integrations.flower.plan import Plan


class Handed(NamedTuple):
    """What a round begins with.

    Attributes:
      start: the state that parties start from, as the algorithm within the messages knows it.
      whole: to be sent to a party that knows nothing yet.
      message: to be sent to one that has what was said in the round before; None if all are alike.
      received: what all messages have come to, or None.
    """

    start: State
    whole: PyTree
    message: PyTree | None = None
    received: PyTree | None = None


def hand_out(plan: Plan, state: State, round: int) -> Handed:
    """What the server sends in a round, from 0."""
    inner = plan.inner(state)
    if plan.down is None:
        return Handed(inner, plan.handed_out(state))
    x = state.trainable
    message, w = _announced(plan.down, x, state.server["received"], plan.key(round))
    start = inner._replace(trainable=heard(x, w))
    others = plan.handed_out(state) | {"trainable": _with(x, w)}
    return Handed(start, others, _message(others, message), w)


def closed(plan: Plan, state: State, handed: Handed, after: State) -> State:
    """The server's state after a round, of the one before and of what the algorithm has made of it."""
    if plan.down is None:
        return after
    x = moved_on(state.trainable, handed.start.trainable, after.trainable)
    return State(x, {"inner": after.server, "received": handed.received})


def expected(plan: Plan, whole: bool) -> PyTree:
    """What has the shapes and types of that which a party is sent."""
    plain = plan.handed_out(plan.initial)
    if plan.down is None:
        return plain
    if whole:
        return plain | {"trainable": nothing_heard(plan)}
    w = plan.initial.server["received"]
    shapes = jax.eval_shape(functools.partial(_announced, plan.down), w, w, plan.key(0))[0]
    return _message(plain, shapes)


def nothing_heard(plan: Plan) -> PyTree:
    """What a party has before the first message: the model, in wide types where it moves."""
    return _with(plan.initial.trainable, plan.initial.server["received"])


def begun(
    plan: Plan, round: int, handed: PyTree, before: PyTree | None = None
) -> tuple[State, PyTree]:
    """What a party starts a round with, of what it was sent, and what it has heard with it.

    Args:
      before: what it had heard, if it was sent a message.
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
