"""Ditto: each client also trains a personal model, kept near the global one.

Ditto: Fair and Robust Federated Learning Through Personalization
    Li, Hu, Beirami, Smith, ICML 2021, arXiv 2012.04221, Algorithm 1
"""

from typing import Unpack

import jax

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


@one_object
def ditto(*, lam: float = 0.1, **work: Unpack[WorkOptions]) -> Algorithm:
    """Trains the global model x as `fed_avg` does, and for each client k a personal model v_k.

    v_k minimises loss(v) + (λ/2) ‖v − x‖², with x as received. A sampled client trains both models on
    the same examples for the same number of steps, so a round takes twice the time of `fed_avg` and
    sends the same. With λ = 0 the personal models equal those of `local_only`. The result of a fit, and
    the loss and the metrics of a record, are those of the personal models.

    Args:
      lam: λ ≥ 0.
      work: as in `fed_avg`.

    Raises:
      ConfigError: a negative λ, or what `Work` refuses.
    """
    if not lam >= 0:
        raise ConfigError(f"ditto: lam must be at least 0, got {lam}")

    def init(trainable, client_init, client_count):
        return State(trainable, (), {"model": trainable, "optimizer": client_init(trainable)})

    def correct(gradient, v, start, x):
        return jax.tree.map(lambda g, v, x: g + lam * (v - x), gradient, v, x)

    def turn(state, cohort, client):
        x = state.trainable

        def group(members, row):
            x_k = stack(x, len(members.share))
            y_k, _, shared = client.update(x_k, client.init(x_k), members)
            v_k, optimizer, report = client.update(
                row["model"], row["optimizer"], members, x_k, correct=correct
            )
            report = report | {"finite": report["finite"] & shared["finite"]}
            moved = weighted_sum(members.share, difference(y_k, x_k))
            return moved, ({"model": v_k, "optimizer": optimizer}, report)

        mean, rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        return State(plus(x, mean), (), population), report

    return Algorithm(
        Work(**work), init, (turn,), whole_model, model=lambda trainable, row: row["model"]
    )
