"""Local training: every client trains alone."""

from typing import Unpack

from fedrag_jax.federated.algorithm import Algorithm, State, Traffic, one_object
from fedrag_jax.federated.work import Work, WorkOptions


@one_object
def local_only(**work: Unpack[WorkOptions]) -> Algorithm:
    """Trains N models with the same start and no exchange; optimizer states are kept between rounds.

    A round is only an interval of training between logs, checkpoints and index refreshes. Models are
    stored on the host. Equal settings return the same object.

    Args:
      work: as in `Work`.

    Raises:
      ConfigError: as `Work`.
    """
    settled = Work(**work)

    def init(trainable, client_init, client_count):
        return State((), (), {"model": trainable, "optimizer": client_init(trainable)})

    def turn(state, cohort, client):
        def group(members, row):
            y, optimizer, report = client.update(row["model"], row["optimizer"], members)
            return (), ({"model": y, "optimizer": optimizer}, report)

        _, rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        return State((), (), population), report

    return Algorithm(
        settled,
        init,
        (turn,),
        traffic=lambda *_: Traffic(),
        model=lambda trainable, row: row["model"],
        needs="nothing",
    )
