"""A round in two places: local training on a client, aggregation on the server.

Both run the algorithm's own `turn`. On a client, `Client.total` returns the client's own term, and the
result of `Client.update` is sent. On the server, `Client.update` returns the received model, and
`Client.total` the sum of all terms. The compiler removes whatever a side does not use.

With encoded messages, `turn` is that of the wrapped algorithm: a client encodes the result of `update`,
and the server decodes it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, Client, PyTree, State, difference, wide
from fedrag_jax.federated.compression.codec import Codec, decoded, encoded
from fedrag_jax.federated.compression.feedback import LABEL, packed
from fedrag_jax.federated.engine.client import all_finite, local_update, update_key
from fedrag_jax.federated.engine.cohort import Batches, Cohort
from fedrag_jax.federated.optimizers import join, split
from fedrag_jax.federated.updates import change_key

NO_REPORT: dict = {"metrics": {}}  # of clients on the server, where nobody asks for it


class SharedRound(NamedTuple):
    """The part of a round that both sides know; hashable, and equal for rounds that share programs.

    Attributes:
      turn: the algorithm's turn.
      fixed, structure: of the clients' optimizer, as `optimizers.split` gives them.
      bounded: `Algorithm.bounded`.
      up: codec of what a client sends, or None.
    """

    turn: Callable
    fixed: tuple
    structure: object
    bounded: Callable | None = None
    up: Codec | None = None

    @property
    def feedback(self) -> bool:
        """Whether clients keep the values that their messages dropped, as "compression" of a row."""
        return self.up is not None and self.up.feedback

    @classmethod
    def of(
        cls, algorithm: Algorithm, optimizer: optax.GradientTransformation, round: int
    ) -> tuple["SharedRound", list]:
        """Returns what both sides share of a round, from 0, and the numbers of its optimizer."""
        fixed, numbers, structure = split(optimizer)
        inner, up, _ = algorithm.messages or (algorithm, None, None)
        turn = inner.turns[round % len(inner.turns)]
        return cls(turn, fixed, structure, algorithm.bounded, up), numbers


def member_of(client: int, share: float, batches: Batches) -> Cohort:
    """A cohort of one client, [1, ...]."""
    return Cohort(
        clients=np.array([client], np.int32),
        share=np.array([share]),
        steps=np.array([batches.steps], np.int32),
        indices=batches.indices[None],
        example_weight=batches.example_weight[None],
    )


@functools.partial(jax.jit, static_argnames=("shared", "loss"))
def client_round(
    shared: SharedRound, loss: Callable, numbers, state: State, frozen, table, member: Cohort, key
) -> tuple[PyTree, PyTree, dict]:
    """The work of one client.

    Args:
      state: what the server handed out, with the client's own row as `population`, or ().
      member: the client, as `member_of` gives it.
      key: random key of the round.

    Returns:
      The message, the client's new row, and the report, without leading axes. The message is the
      trained model, bounded by the algorithm, and encoded if there is a codec.
    """
    client = local_update(loss, join(shared.fixed, numbers, shared.structure), frozen, table, key)
    made = []

    def update(*arguments, **options):
        y, optimizer, report = client.update(*arguments, **options)
        x, y, report = jax.tree.map(lambda x: x[0], (arguments[0], y, report))
        if shared.bounded is not None:
            y = shared.bounded(y, x)
        sent, left = y, ()
        if shared.up is not None:
            left = state.population[LABEL] if shared.feedback else ()
            own_key = change_key(key, LABEL, member.clients[0])
            sent, left = packed(shared.up, difference(y, x), left, own_key)
            y = _unpacked(shared.up, sent, x, own_key)  # what the server sees is what counts
        made.append((sent, left, report))
        y, report = jax.tree.map(lambda x: x[None], (y, report))
        return y, optimizer, report

    own = client._replace(update=update, total=_alone([]))
    after, _ = shared.turn(_with_row(shared, state), [_lead(member)], own)
    ((sent, left, report),) = made
    row = jax.tree.map(lambda x: x[0, 0], after.population[0]) if after.population else ()
    return sent, {"inner": row, LABEL: left} if shared.feedback else row, report


@functools.partial(jax.jit, static_argnames="shared")
def share_of_sums(
    shared: SharedRound, numbers, state: State, frozen, member: Cohort, sent, key
) -> PyTree:
    """Returns the terms that one client adds to the sums of a round.

    Args:
      state: of the server, with any row as `population`, or ().
      member: the client; its batches do not matter.
      sent: by it.
    """

    def update(x, optimizer, *_, **__):
        y = sent
        if shared.up is not None:
            own_key = change_key(key, LABEL, member.clients[0])
            y = _unpacked(shared.up, sent, jax.tree.map(lambda x: x[0], x), own_key)
        return jax.tree.map(lambda y: y[None], y), optimizer, NO_REPORT

    sums: list = []
    client = _server_client(shared, numbers, frozen, key)
    client = client._replace(update=update, total=_alone(sums))
    shared.turn(_with_row(shared, state), [_lead(member)], client)
    return sums[0]


@functools.partial(jax.jit, static_argnames="shared")
def server_step(
    shared: SharedRound, numbers, state: State, frozen, sums, key
) -> tuple[State, jax.Array]:
    """The state after a round, without a population, and whether it is finite."""
    client = _server_client(shared, numbers, frozen, key)
    client = client._replace(total=lambda work, *inputs: (sums, [((), ())]))
    after, _ = shared.turn(state._replace(population=()), [()], client)
    return after._replace(population=()), all_finite((after.trainable, after.server))


def sent_shapes(
    shared: SharedRound, numbers, state: State, frozen, name: str
) -> tuple[PyTree, PyTree]:
    """Shapes and types of what a client sends in a round, and of the sums over clients.

    Args:
      name: of the algorithm, for messages.

    Raises:
      ConfigError: a turn that does not hand all of its clients' work to `Client.total` at once.
    """
    seen, sums = [], []

    def update(x, optimizer, *_, **__):
        y = jax.tree.map(lambda x: x[0], x)
        seen.append(y if shared.up is None else encoded(shared.up, difference(y, y), update_key(0)))
        return x, optimizer, NO_REPORT

    def traced(numbers, state, frozen, member, key):
        client = _server_client(shared, numbers, frozen, key)
        client = client._replace(update=update, total=_alone(sums))
        shared.turn(_with_row(shared, state), [_lead(member)], client)
        if len(seen) != 1 or len(sums) != 1:
            raise ConfigError(
                f"{name} cannot be deployed: a turn must call Client.total once and Client.update "
                f"once, but it calls them {len(sums)} and {len(seen)} times"
            )
        return seen[0], sums[0]

    nobody = member_of(0, 1.0, Batches(0, np.zeros((1, 1), np.int32), np.zeros((1, 1))))
    return jax.eval_shape(traced, numbers, state, frozen, nobody, jax.random.key(0))


def _unpacked(codec: Codec, message, x: PyTree, key) -> PyTree:
    """Returns the model that a message encodes, as a change of x."""
    told = decoded(codec, message, difference(x, x), key)
    return jax.tree.map(lambda x, u: wide(x) + u, x, told)


def _server_client(shared: SharedRound, numbers, frozen, key) -> Client:
    optimizer = join(shared.fixed, numbers, shared.structure)

    def nothing(*_, **__):
        raise AssertionError("nobody trains on the server")

    return Client(jax.vmap(optimizer.init), nothing, nothing, nothing, frozen, key)


def _alone(sums: list) -> Callable:
    """`Client.total` of one client, which keeps what it would have added up."""

    def total(work, *inputs):
        found, rest = work(*(jax.tree.map(lambda x: x[0], part) for (part,) in inputs))
        sums.append(found)
        return found, [jax.tree.map(lambda x: jnp.asarray(x)[None], rest)]

    return total


def _with_row(shared: SharedRound, state: State) -> State:
    """A population of one client, in one part, as the turn knows it."""
    row = state.population
    if shared.feedback and row:
        row = row["inner"]
    if not jax.tree.leaves(row):
        return state._replace(population=())
    return state._replace(population=[jax.tree.map(lambda x: x[None, None], row)])


def _lead(member: Cohort) -> Cohort:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], member)
