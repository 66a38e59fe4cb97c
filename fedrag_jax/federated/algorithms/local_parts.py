"""Averaging of a part of the model; the rest stays with the clients.

Federated Learning with Personalization Layers (FedPer)
    Arivazhagan, Aggarwal, Singh, Choudhary, 2019, arXiv 1912.00818, Algorithms 1 and 2

FedSA-LoRA (`fed_lora("fedsa", network)`) is this with every B as the local part.
"""

from typing import Unpack

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    difference,
    one_object,
    plus,
    stack,
    weighted_sum,
)
from fedrag_jax.federated.algorithms.fed_avg import whole_model
from fedrag_jax.federated.work import Work, WorkOptions
from fedrag_jax.models.network import flatten, unflatten


@one_object
def local_parts(*, private: tuple[str, ...], **work: Unpack[WorkOptions]) -> Algorithm:
    """Averages all but the private parts as in `fed_avg`.

    Private parts stay with their client from round to round and are trained with the rest. They are
    neither sent nor counted as bytes.

    Args:
      private: names within what the task trains, such as "head" or "lora_b": everything below such a
        name stays.
      work: as in `fed_avg`.

    Raises:
      ConfigError: no names, or what `Work` refuses; in a fit, a name that nothing has, or nothing that
        is left to average.
    """
    if not private:
        raise ConfigError(
            "local_parts: `private` is empty; name the parts that stay with the clients, or use fed_avg"
        )

    def init(trainable, client_init, client_count):
        names = {name for path, _ in flatten(trainable) for name in path}
        if missing := [name for name in private if name not in names]:
            raise ConfigError(
                f"local_parts: the task trains no part named {missing}; choose among {sorted(names)}"
            )
        shared, own = parted(trainable, private)
        if not shared:
            raise ConfigError(
                f"local_parts: everything that is trained is below {private}, so nothing is averaged; "
                "take local_only"
            )
        return State(shared, (), own)

    def turn(state, cohort, client):
        x = state.trainable

        def group(members, own):
            start = joined(stack(x, len(members.share)), own)
            y_k, _, report = client.update(start, client.init(start), members)
            y_k, own = parted(y_k, private)
            moved = difference(y_k, stack(x, len(members.share)))
            return weighted_sum(members.share, moved), (own, report)

        mean, rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        return State(plus(x, mean), (), population), report

    return Algorithm(
        Work(**work),
        init,
        (turn,),
        whole_model,  # of the server's state, which has the shared part alone
        model=joined,
        sent=lambda trainable, turn: parted(trainable, private)[0],
    )


def parted(trainable: dict, private: tuple[str, ...]) -> tuple[dict, dict]:
    """Returns the shared and the private part, as nested dicts."""
    shared, own = [], []
    for path, leaf in flatten(trainable):
        (own if {*path} & {*private} else shared).append((path, leaf))
    return unflatten(shared), unflatten(own)


def joined(shared: dict, own: dict) -> dict:
    """Undoes `parted`."""
    return unflatten([*flatten(shared), *flatten(own)])
