"""Federated averaging with momentum on the server.

Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification
    Hsu, Qi, Brown, 2019, arXiv 1909.06335, section 4.2
"""

from typing import Unpack

import optax

from fedrag_jax.federated.algorithm import Algorithm, one_object, positive, require_momentum
from fedrag_jax.federated.algorithms.fed_avg import averaging
from fedrag_jax.federated.work import Work, WorkOptions


@one_object
def fed_avg_m(
    *, learning_rate: float = 1.0, momentum: float = 0.9, **work: Unpack[WorkOptions]
) -> Algorithm:
    """v ← βv + Δ; x ← x + ηv, with Δ the mean update of `fed_avg` and v₀ = 0.

    Args:
      learning_rate: η, the server's learning rate.
      momentum: β.
      work: as in `fed_avg`.
    """
    positive("fed_avg_m", learning_rate=learning_rate)
    require_momentum("fed_avg_m", momentum=momentum)
    server = optax.sgd(learning_rate, momentum=momentum)
    return averaging(Work(**work), server)
