"""Krum and Multi-Krum, which select the updates with the closest neighbours.

Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
    Blanchard, El Mhamdi, Guerraoui, Stainer, NeurIPS 2017, arXiv 1703.02757, section 3

The score of an update is the sum of the squared distances to its n − f − 2 nearest neighbours, for n
clients of which f are hostile.
"""

import functools

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.robust.rule import Rule, mean_of, of_hostile


@functools.cache
def krum(byzantine: int = 1) -> Rule:
    """The update with the lowest score. Needs 2f + 3 clients."""

    def combine(updates, share, there):
        kept = _places(scores(updates, there, byzantine)) < 1
        return mean_of(updates, share, kept & there), kept & there

    return of_hostile("krum", combine, byzantine, lambda f: 2 * f + 3)


@functools.cache
def multi_krum(byzantine: int = 1, keep: int = 0) -> Rule:
    """The mean of the `keep` updates with the lowest scores (default n − f), with equal weights.

    Needs 2f + 3 clients.

    Raises:
      ConfigError: a negative number.
    """
    if keep < 0:
        raise ConfigError(f"multi_krum: keep must be at least 0, got {keep}")

    def combine(updates, share, there):
        most = keep or there.sum() - byzantine
        kept = (_places(scores(updates, there, byzantine)) < most) & there
        return mean_of(updates, jnp.ones_like(share), kept), kept

    rule = of_hostile("multi_krum", combine, byzantine, lambda f: max(2 * f + 3, keep))
    return rule._replace(name=f"multi_krum(byzantine={byzantine}, keep={keep})")


def scores(updates: jax.Array, there: jax.Array, byzantine: int) -> jax.Array:
    """Returns Krum's scores, [K]; infinite for absent clients."""
    # Distances from differences, not from products: one huge update would cost the others their digits.
    squares = jax.lax.map(lambda mine: jnp.square(updates - mine[None]).sum(1), updates)
    others = there[None] & there[:, None] & ~jnp.eye(len(updates), dtype=bool)
    nearest = jnp.sort(jnp.where(others, squares, jnp.inf), axis=1)
    counted = jnp.arange(len(updates)) < there.sum() - byzantine - 2
    return jnp.where(there, jnp.where(counted[None], nearest, 0).sum(1), jnp.inf)


def _places(values: jax.Array) -> jax.Array:
    """Returns the rank of each value in ascending order; ties keep their order."""
    return jnp.argsort(jnp.argsort(values, stable=True), stable=True)
