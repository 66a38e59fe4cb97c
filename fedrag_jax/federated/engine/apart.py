"""A round in two places: what a client does where its examples are, and what the server makes of it.

Both run the turn of an algorithm as it stands. A turn hands the work of clients to `Client.total`, and
that work calls `Client.update`. A client answers `total` with its own work alone, and sends what
`update` made of the model. The server answers `update` with what a client has sent, and `total` with
the sum over those who answered. What a side computes and does not ask for, the compiler leaves out.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, Client, PyTree, State
from fedrag_jax.federated.engine.client import all_finite, local_update
from fedrag_jax.federated.engine.cohort import Batches, Cohort
from fedrag_jax.federated.optimizers import join, split


class Place(NamedTuple):
    """What both sides know of a round; hashable, and equal for rounds that share programs.

    Attributes:
      turn: of the algorithm.
      fixed, structure: of the clients' optimizer, as `optimizers.split` gives them.
    """

    turn: Callable
    fixed: tuple
    structure: object

    @classmethod
    def of(
        cls, algorithm: Algorithm, optimizer: optax.GradientTransformation, round: int
    ) -> tuple["Place", list]:
        """That of a round, from 0, and the numbers of the optimizer."""
        fixed, numbers, structure = split(optimizer)
        turn = algorithm.turns[round % len(algorithm.turns)]
        return cls(turn, fixed, structure), numbers


def member_of(client: int, share: float, batches: Batches) -> Cohort:
    """A cohort of one client, [1, ...]."""
    return Cohort(
        clients=np.array([client], np.int32),
        share=np.array([share]),
        steps=np.array([batches.steps], np.int32),
        indices=batches.indices[None],
        example_weight=batches.example_weight[None],
    )


@functools.partial(jax.jit, static_argnames=("place", "loss"))
def client_round(
    place: Place, loss: Callable, numbers, state: State, frozen, table, member: Cohort, key
) -> tuple[PyTree, PyTree, dict]:
    """The work of one client.

    Args:
      state: what the server handed out, with the client's own row as `population`, or ().
      member: the client, as `member_of` gives it.
      key: of the round.

    Returns:
      What `update` made of the model, the client's row after it, and the report: no leading axes.
    """
    client = local_update(loss, join(place.fixed, numbers, place.structure), frozen, table, key)
    made = []

    def update(*arguments, **options):
        y, optimizer, report = client.update(*arguments, **options)
        made.append((y, report))
        return y, optimizer, report

    own = client._replace(update=update, total=_alone([]))
    after, _ = place.turn(_with_row(state), [_lead(member)], own)
    ((y, report),) = made
    y, report = jax.tree.map(lambda x: x[0], (y, report))
    row = jax.tree.map(lambda x: x[0, 0], after.population[0]) if after.population else ()
    return y, row, report


@functools.partial(jax.jit, static_argnames="place")
def share_of_sums(place: Place, numbers, state: State, frozen, member: Cohort, y, key) -> PyTree:
    """What one client adds to the sums of a round.

    Args:
      state: of the server, with any row as `population`, or ().
      member: the client; its batches do not matter.
      y: what it sent.
    """

    def update(x, optimizer, *_, **__):
        return jax.tree.map(lambda y: y[None], y), optimizer, {}

    sums: list = []
    client = _server_client(place, numbers, frozen, key)
    client = client._replace(update=update, total=_alone(sums))
    place.turn(_with_row(state), [_lead(member)], client)
    return sums[0]


@functools.partial(jax.jit, static_argnames="place")
def server_step(place: Place, numbers, state: State, frozen, sums, key) -> tuple[State, jax.Array]:
    """The state after a round, without a population, and whether it is finite."""
    client = _server_client(place, numbers, frozen, key)
    client = client._replace(total=lambda work, *inputs: (sums, [((), ())]))
    after, _ = place.turn(state._replace(population=()), [()], client)
    return after._replace(population=()), all_finite((after.trainable, after.server))


def sent_shapes(place: Place, numbers, state: State, frozen, name: str) -> tuple[PyTree, PyTree]:
    """Shapes and types of what a client sends in a round, and of the sums over clients.

    Args:
      name: of the algorithm, for messages.

    Raises:
      ConfigError: a turn that does not hand all of its clients' work to `Client.total` at once.
    """
    seen, sums = [], []

    def update(x, optimizer, *_, **__):
        seen.append(jax.tree.map(lambda x: x[0], x))
        return x, optimizer, {}

    def traced(numbers, state, frozen, member, key):
        client = _server_client(place, numbers, frozen, key)
        client = client._replace(update=update, total=_alone(sums))
        place.turn(_with_row(state), [_lead(member)], client)
        if len(seen) != 1 or len(sums) != 1:
            raise ConfigError(
                f"{name} cannot be deployed: in a round its clients' work is to be handed to "
                f"Client.total once and call Client.update once, not {len(sums)} and {len(seen)} times"
            )
        return seen[0], sums[0]

    nobody = member_of(0, 1.0, Batches(0, np.zeros((1, 1), np.int32), np.zeros((1, 1))))
    return jax.eval_shape(traced, numbers, state, frozen, nobody, jax.random.key(0))


def _server_client(place: Place, numbers, frozen, key) -> Client:
    optimizer = join(place.fixed, numbers, place.structure)

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


def _with_row(state: State) -> State:
    """A population of one client, in one part."""
    if not jax.tree.leaves(state.population):
        return state._replace(population=())
    return state._replace(population=[jax.tree.map(lambda x: x[None, None], state.population)])


def _lead(member: Cohort) -> Cohort:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], member)
