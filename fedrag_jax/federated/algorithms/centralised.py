"""Centralised training: one client holds all data."""

import jax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, State, Traffic, one_object, stack
from fedrag_jax.federated.work import Work


@one_object
def centralised(*, local_steps: int = 10, local_epochs: int | None = None) -> Algorithm:
    """Trains one model; the optimizer's state is kept between rounds.

    Args:
      local_steps, local_epochs: length of a round, as in `Work`.

    Raises:
      ConfigError: as `Work`; in a fit, more than one client.
    """
    work = Work(local_steps, local_epochs)

    def init(trainable, client_init, client_count):
        if client_count != 1:
            raise ConfigError(
                f"centralised: there are {client_count} clients; give a list of examples, or "
                "use fed_avg() or local_only()"
            )
        return State(trainable, client_init(trainable))

    def turn(state, cohort, client):
        (members,) = cohort
        x, optimizer = stack((state.trainable, state.server), 1)
        members = jax.tree.map(lambda x: x[0], members)
        y, optimizer, report = client.update(x, optimizer, members)
        y, optimizer = jax.tree.map(lambda x: x[0], (y, optimizer))
        return State(y, optimizer), [jax.tree.map(lambda x: x[None], report)]

    return Algorithm(work, init, (turn,), traffic=lambda *_: Traffic(), needs="nothing")
