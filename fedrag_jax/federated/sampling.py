"""Client sampling: the selection of clients for a round.

A sampling gets the number of examples of each of the N clients, and a random stream that depends on the
seed and the round, so that a resumed run samples the same clients.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedrag_jax.errors import ConfigError


class ClientSampling(NamedTuple):
    """A method of sampling clients.

    Attributes:
      name: name with settings.
      places: `places(sizes) -> int`: the number of clients that a round must have room for.
      draw: `draw(sizes, rng) -> int array` of different clients; may be empty.
    """

    name: str
    places: Callable[[np.ndarray], int]
    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]


everyone = ClientSampling("everyone", len, lambda sizes, rng: np.arange(len(sizes)))


@functools.cache
def uniform(clients: int) -> ClientSampling:
    """Samples a number of different clients, all equally likely."""
    return _without_replacement("uniform", clients, lambda sizes: None)


@functools.cache
def weighted(clients: int) -> ClientSampling:
    """Samples a number of different clients one after another, in proportion to their examples.

    Use `weighting="uniform"` with it: weighting by examples too would count them twice.
    """
    return _without_replacement("weighted", clients, lambda sizes: sizes / sizes.sum())


@functools.cache
def poisson(rate: float) -> ClientSampling:
    """Samples every client independently with probability `rate`, as privacy accounting requires.

    A round may be empty; then the model does not change, except by the server's momentum.

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
    """Uses the same clients in every round.

    Raises:
      ConfigError: no clients, or a repeated client; in a fit, a client that does not exist.
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
                f"{name}({clients}): the partition has {len(sizes)} clients; sample fewer"
            )
        return rng.choice(len(sizes), clients, replace=False, p=chances(sizes))

    return ClientSampling(f"{name}({clients})", lambda sizes: min(clients, len(sizes)), draw)
