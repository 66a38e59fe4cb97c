"""Averaging of clients that are kept close to the global model by a penalty.

Federated Optimization in Heterogeneous Networks
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020, arXiv 1812.06127, Algorithm 2
"""

from typing import Unpack

import jax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, one_object
from fedrag_jax.federated.algorithms.fed_avg import averaging
from fedrag_jax.federated.work import Work, WorkOptions


@one_object
def fed_prox(*, mu: float = 0.01, **work: Unpack[WorkOptions]) -> Algorithm:
    """Clients minimise loss(y) + (μ/2) ‖y − x‖² with the squared norm; μ = 0 gives `fed_avg`.

    The gradient μ(y − x) is added to the gradient of the loss. The reported loss is the task's loss
    without the penalty.

    Args:
      mu: μ ≥ 0.
      work: as in `fed_avg`.

    Raises:
      ConfigError: a negative μ; as `Work`.
    """
    if not mu >= 0:
        raise ConfigError(f"fed_prox: mu must be at least 0, got {mu}")

    def correct(gradient, y, x, own):
        return jax.tree.map(lambda g, y, x: g + mu * (y - x), gradient, y, x)

    return averaging(Work(**work), correct=correct)
