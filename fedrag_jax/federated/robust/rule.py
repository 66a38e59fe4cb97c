"""What a robust rule is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError


class Combine(Protocol):
    """How updates become one."""

    def __call__(
        self, updates: jax.Array, share: jax.Array, there: jax.Array, /
    ) -> tuple[jax.Array, jax.Array]:
        """What the updates come to, [D], and bool [K], whose counted.

        Args:
          updates: [K, D], finite.
          share: [K] p_k of the clients' weighting, which some rules use.
          there: bool [K]; the other rows are zeros, and nobody's.
        """


class Rule(NamedTuple):
    """One way to make one update of many.

    Attributes:
      name: with its settings.
      least: clients that it needs in a round.
    """

    name: str
    combine: Combine
    least: int = 1

    def __str__(self):
        return self.name


def of_hostile(name: str, combine: Callable, byzantine: int, needs: Callable[[int], int]) -> Rule:
    """A rule that holds for so many hostile clients, and needs a number of clients because of them.

    Raises:
      ConfigError: a negative number of them.
    """
    if byzantine < 0:
        raise ConfigError(f"{name}: byzantine must be at least 0, got {byzantine}")
    return Rule(f"{name}(byzantine={byzantine})", combine, needs(byzantine))


def mean_of(updates: jax.Array, share: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean of the rows that are kept, by their shares; zeros if none is."""
    p = jnp.where(kept, share, 0).astype(updates.dtype)
    total = p.sum()
    return jnp.where(total > 0, (p / jnp.where(total > 0, total, 1)) @ updates, 0)


def median_of(values: jax.Array, there: jax.Array) -> jax.Array:
    """The median over the leading axis of the rows that are there; the mean of both middle ones."""
    ordered, count = ascending(values, there)
    low, high = jnp.maximum(count - 1, 0) // 2, count // 2
    return (jnp.take(ordered, low, axis=0) + jnp.take(ordered, high, axis=0)) / 2


def ascending(values: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows that are there, sorted by each column, before infinities; and how many they are."""
    alone = there.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.sort(jnp.where(alone, values, jnp.inf), axis=0), there.sum()
