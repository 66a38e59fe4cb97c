"""Which client holds which examples."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError

MAX_DRAWS = 100

# scheme(examples, seed) -> (rows of each client, number of the draw that was kept)
Scheme = Callable[[Sequence[Any], int], tuple[tuple[np.ndarray, ...], int]]


@dataclasses.dataclass(frozen=True)
class Partition:
    """Examples and the clients that hold them; no example is with two clients.

    Attributes:
      examples: all of them, N in number.
      clients: K int arrays of rows of `examples`, none empty.
      draw: which draw satisfied the scheme; with its seed it gives the same clients again.

    Raises:
      DataError: a client without examples, a row out of range, or one held twice.
    """

    examples: Sequence[Any]
    clients: tuple[np.ndarray, ...]
    draw: int = 0

    def __post_init__(self):
        if not self.clients:
            raise DataError("partition: no clients; give at least one array of rows")
        for client, rows in enumerate(self.clients):
            if len(rows) == 0:
                raise DataError(f"partition: client {client} has no examples; leave it out")
        rows = np.concatenate(self.clients)
        if rows.min() < 0 or rows.max() >= len(self.examples):
            raise DataError(
                f"partition: rows go from {rows.min()} to {rows.max()} "
                f"but there are {len(self.examples)} examples; count from 0"
            )
        if len(np.unique(rows)) < len(rows):
            raise DataError("partition: an example is held twice; each may be with one client only")

    def of(self, client: int) -> list[Any]:
        """The examples of one client."""
        return [self.examples[row] for row in self.clients[client]]

    def counts(self, column: str = "topic") -> tuple[list[Any], np.ndarray]:
        """The C classes of a column, sorted, and how many of each a client has, int [K, C]."""
        classes, labels = np.unique(_labels(self.examples, column), return_inverse=True)
        table = [np.bincount(labels[rows], minlength=len(classes)) for rows in self.clients]
        return classes.tolist(), np.stack(table)


def partition(examples: Sequence[Any], scheme: Scheme, seed: int = 0) -> Partition:
    """Splits examples among clients; the same seed gives the same clients.

    Raises:
      DataError: no examples, or what the scheme refuses.
      ConfigError: more clients than examples.
    """
    if len(examples) == 0:
        raise DataError("partition: there are no examples to split; load some first")
    clients, draw = scheme(examples, seed)
    return Partition(examples, clients, draw)


def iid(clients: int) -> Scheme:
    """Examples shuffled and dealt out evenly: client sizes differ by one at most."""
    _require_clients(clients)

    def split(examples, seed):
        _require_enough(examples, clients, 1)
        order = stream(seed, "partition").permutation(len(examples))
        return tuple(np.sort(rows) for rows in np.array_split(order, clients)), 0

    return split


def dirichlet(alpha: float, clients: int, column: str = "topic", min_examples: int = 2) -> Scheme:
    """Label skew: each class is shared out among the clients in proportions ~ Dir(alpha).

    Hsu, Qi and Brown 2019 (arXiv 1909.06335) in the per-class form of Li et al. 2021 (2102.02079).

    Args:
      alpha: concentration > 0; 0.1 gives each client few classes, `inf` is IID.
      column: attribute or key of an example that holds its class.
      min_examples: everything is drawn again, up to 100 times, until each client has so many.

    Raises:
      ConfigError: alpha not > 0, fewer than one client, or too few examples for the clients.
      DataError: an example without the column, or no draw among 100 with `min_examples` for all.
    """
    if not alpha > 0:
        raise ConfigError(f"dirichlet: alpha must be > 0, got {alpha}; use inf for IID clients")
    _require_clients(clients)

    def split(examples, seed):
        _require_enough(examples, clients, min_examples)
        if math.isinf(alpha):
            return iid(clients)(examples, seed)
        classes, labels = np.unique(_labels(examples, column), return_inverse=True)
        for draw in range(MAX_DRAWS):
            rng = stream(seed, "partition", draw)
            parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
            for label in range(len(classes)):
                rows = rng.permutation(np.flatnonzero(labels == label))
                proportions = rng.dirichlet(np.full(clients, alpha))
                cuts = np.round(np.cumsum(proportions)[:-1] * len(rows)).astype(int)
                for part, share in zip(parts, np.split(rows, cuts), strict=True):
                    part.append(share)
            result = tuple(np.sort(np.concatenate(part)) for part in parts)
            if min(map(len, result)) >= min_examples:
                return result, draw
        raise DataError(
            f"dirichlet(alpha={alpha}, clients={clients}): in {MAX_DRAWS} draws from seed {seed} "
            f"some client always had fewer than {min_examples} of the {len(examples)} examples; "
            "raise alpha, take fewer clients, or lower min_examples"
        )

    return split


def _labels(examples, column: str) -> np.ndarray:
    labels = []
    for row, example in enumerate(examples):
        try:
            mapping = isinstance(example, Mapping)
            labels.append(example[column] if mapping else getattr(example, column))
        except (KeyError, AttributeError):
            raise DataError(
                f"partition: example {row} has no {column!r}; name a column that all examples have"
            ) from None
    return np.array(labels)


def _require_clients(clients: int) -> None:
    if clients < 1:
        raise ConfigError(f"partition: clients must be at least 1, got {clients}")


def _require_enough(examples, clients: int, each: int) -> None:
    if clients * each > len(examples):
        raise ConfigError(
            f"partition: {clients} clients with at least {each} each need {clients * each} "
            f"examples, got {len(examples)}; take fewer clients"
        )
