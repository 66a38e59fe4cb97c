"""Federated averaging, after which every client tunes the model for itself.

Salvaging Federated Learning by Local Adaptation
    Yu, Bagdasaryan, Shmatikov, 2020, arXiv 2002.04758, section 4 (fine-tuning)
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    Traffic,
    difference,
    one_object,
    plus,
    stack,
    weighted_sum,
)
from fedrag_jax.federated.algorithms.fed_avg import whole_model
from fedrag_jax.federated.work import Work, WorkOptions


@one_object
def fine_tuned(*, together: int = 8, alone: int = 2, **work: Unpack[WorkOptions]) -> Algorithm:
    """`fed_avg` for `together` rounds, then `alone` rounds in which each client trains by itself.

    In the second part a client keeps its optimizer state between rounds, and nothing is sent. A client
    that is not sampled there keeps the global model; so do all clients if the fit ends before it. With
    alone = 0 this is `fed_avg`, with together = 0 `local_only`; each client has its own model.

    Bytes are counted as if all clients that go on alone were sampled in the first round alone, in which
    they receive the averaged model.

    Args:
      together, alone: rounds; a fit takes as many as both, or fewer.
      work: as in `fed_avg`.

    Raises:
      ConfigError: negative rounds, or none; what `Work` refuses; in a fit, more rounds.
    """
    if together < 0 or alone < 0 or together + alone < 1:
        raise ConfigError(
            "fine_tuned: together and alone must be at least 0, and their sum at least 1, got "
            f"{together} and {alone}"
        )

    def init(trainable, client_init, client_count):
        row = {"model": trainable, "optimizer": client_init(trainable), "tuned": jnp.array(False)}
        return State(trainable, (), row)

    def model(x, row):
        return jax.tree.map(lambda v, x: jnp.where(row["tuned"], v, x), row["model"], x)

    def average(state, cohort, client):
        x = state.trainable

        def group(members, row):
            x_k = stack(x, len(members.share))
            y_k, _, report = client.update(x_k, client.init(x_k), members)
            return weighted_sum(members.share, difference(y_k, x_k)), (row, report)

        mean, rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        return State(plus(x, mean), (), population), report

    def tune(state, cohort, client):
        def group(members, row):
            start = jax.vmap(model, (None, 0))(state.trainable, row)
            v_k, optimizer, report = client.update(start, row["optimizer"], members)
            tuned = jnp.ones_like(row["tuned"])
            return (), ({"model": v_k, "optimizer": optimizer, "tuned": tuned}, report)

        _, rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        return State(state.trainable, (), population), report

    def traffic(trainable, drawn, answered, round):
        whole = whole_model(trainable, drawn, answered, round)
        if round < together:
            return whole
        # What the rounds together came to is sent once more, before clients go on alone.
        return Traffic(down=whole.down) if together and round == together else Traffic()

    def record_fields(rounds):
        if rounds > together + alone:
            raise ConfigError(
                f"fine_tuned: the fit has {rounds} rounds, but together + alone is "
                f"{together + alone}; raise one of them"
            )
        return {}

    turns = (average,) * together + (tune,) * alone
    return Algorithm(Work(**work), init, turns, traffic, model=model, record_fields=record_fields)
