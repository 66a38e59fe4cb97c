"""Half of the mean update."""

import optax

from fedrag_jax.federated.algorithm import one_object
from fedrag_jax.federated.algorithms.fed_avg import averaging
from fedrag_jax.federated.work import Work


@one_object
def half(*, share: float = 0.5, **work):
    """x + share of the mean update."""
    return averaging(Work(**work), optax.sgd(share))
