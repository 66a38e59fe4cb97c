"""Client sampling: who is drawn for a round.

A sampling sees how many examples each of the N clients holds, and a random stream that knows the seed
and the round, so that a resumed run draws the same clients.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedrag_jax.errors import ConfigError


class ClientSampling(NamedTuple):
    """One way of drawing clients.

    Attributes:
      name: with its settings.
      places: `places(sizes) -> int`, how many clients a round should have room for.
      draw: `draw(sizes, rng) -> int array` of different clients; may be empty.
    """

    name: str
    places: Callable[[np.ndarray], int]
    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]


everyone = ClientSampling("everyone", len, lambda sizes, rng: np.arange(len(sizes)))


@functools.cache
def uniform(clients: int) -> ClientSampling:
    """So many different clients, each as likely as any other."""
    return _without_replacement("uniform", clients, lambda sizes: None)


@functools.cache
def weighted(clients: int) -> ClientSampling:
    """So many different clients, drawn one after another in proportion to their examples.

    Wants `weighting="uniform"`: to weigh by examples again would count them twice.
    """
    return _without_replacement("weighted", clients, lambda sizes: sizes / sizes.sum())


@functools.cache
def poisson(rate: float) -> ClientSampling:
    """Every client for itself with probability `rate`, as accounting for privacy wants it.

    A round may be empty, and then the model stays as it is but for the server's momentum.

    Raises:
      ConfigError: a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"poisson: rate must be in (0, 1], got {rate}")

    def places(sizes):
        mean = rate * len(sizes)
        return min(len(sizes), math.ceil(mean + 6 * math.sqrt(mean)))

    return ClientSampling(
        f"poisson({rate})",
        places,
        lambda sizes, rng: np.flatnonzero(rng.random(len(sizes)) < rate),
    )


@functools.cache
def fixed(*clients: int) -> ClientSampling:
    """The same clients in every round.

    Raises:
      ConfigError: no clients, or one twice; in a fit, one that is not there.
    """
    if not clients or len(set(clients)) < len(clients):
        raise ConfigError(f"fixed: name different clients, got {clients}")

    def draw(sizes, rng):
        if min(clients) < 0 or max(clients) >= len(sizes):
            raise ConfigError(f"fixed: clients go from 0 to {len(sizes) - 1}, got {clients}")
        return np.array(clients)

    return ClientSampling(f"fixed{clients}", lambda sizes: len(clients), draw)


def _without_replacement(name, clients, chances) -> ClientSampling:
    if clients < 1:
        raise ConfigError(f"{name}: clients must be at least 1, got {clients}")

    def draw(sizes, rng):
        if clients > len(sizes):
            raise ConfigError(
                f"{name}({clients}): the partition has {len(sizes)} clients; draw fewer"
            )
        return rng.choice(len(sizes), clients, replace=False, p=chances(sizes))

    return ClientSampling(f"{name}({clients})", lambda sizes: min(clients, len(sizes)), draw)
