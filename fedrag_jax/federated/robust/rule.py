"""The type `Rule` of robust aggregation."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError


class Combine(Protocol):
    """Combines updates into one."""

    def __call__(
        self, updates: jax.Array, share: jax.Array, there: jax.Array, /
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the combined update [D], and bool [K], whether each client's update counted.

        Args:
          updates: [K, D], finite.
          share: [K] p_k by the clients' weighting, used by some rules.
          there: bool [K], whether a client is present; other rows are zeros.
        """


class Rule(NamedTuple):
    """A rule that combines many updates into one.

    Attributes:
      name: name with settings.
      least: minimum number of clients in a round.
    """

    name: str
    combine: Combine
    least: int = 1

    def __str__(self):
        return self.name


def of_hostile(name: str, combine: Callable, byzantine: int, needs: Callable[[int], int]) -> Rule:
    """Returns a rule that tolerates `byzantine` hostile clients and needs enough clients for that.

    Raises:
      ConfigError: a negative number.
    """
    if byzantine < 0:
        raise ConfigError(f"{name}: byzantine must be at least 0, got {byzantine}")
    return Rule(f"{name}(byzantine={byzantine})", combine, needs(byzantine))


def mean_of(updates: jax.Array, share: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns the mean of the kept rows, weighted by their shares; zeros if there are none."""
    p = jnp.where(kept, share, 0).astype(updates.dtype)
    total = p.sum()
    return jnp.where(total > 0, (p / jnp.where(total > 0, total, 1)) @ updates, 0)


def median_of(values: jax.Array, there: jax.Array) -> jax.Array:
    """Returns the median over the present rows of the leading axis; the mean of the two middle
    values."""
    ordered, count = ascending(values, there)
    low, high = jnp.maximum(count - 1, 0) // 2, count // 2
    return (jnp.take(ordered, low, axis=0) + jnp.take(ordered, high, axis=0)) / 2


def ascending(values: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the present rows, each column sorted and followed by infinities; and their number."""
    alone = there.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.sort(jnp.where(alone, values, jnp.inf), axis=0), there.sum()
