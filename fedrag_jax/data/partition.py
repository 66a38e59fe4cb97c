"""Partitions of examples over clients, and statistics of how clients differ; see also `schemes`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedrag_jax.errors import DataError

# scheme(examples, seed) -> (rows of each client, number of the draw that was kept)
Scheme = Callable[[Sequence[Any], int], tuple[tuple[np.ndarray, ...], int]]
# What clients differ in: an attribute or key of every example, or N labels beside N examples.
Column = str | Sequence[Any] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Partition:
    """Examples and the clients that hold them; no example belongs to two clients.

    Attributes:
      examples: all N examples.
      clients: K int arrays of rows of `examples`, none empty.
      draw: number of the draw that satisfied the scheme; with the seed it reproduces the clients.

    Raises:
      DataError: a client without examples, a row out of range, or a row held twice.
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
        held = np.bincount(rows)
        if held.max() > 1:
            raise DataError(
                f"partition: example {held.argmax()} is held twice; each may be with one client only"
            )

    def of(self, client: int) -> list[Any]:
        """Returns the examples of one client."""
        return [self.examples[row] for row in self.clients[client]]

    def sizes(self) -> np.ndarray:
        """Returns the number of examples of each client, int [K]."""
        return np.array([len(rows) for rows in self.clients])

    def counts(self, column: Column = "topic") -> tuple[list[Any], np.ndarray]:
        """Returns the C classes of a column, sorted, and the counts per client and class, int [K,
        C]."""
        classes, labels = classes_of(self.examples, column)
        shape = len(self.clients), len(classes)
        owner = np.repeat(np.arange(len(self.clients)), self.sizes())
        cell = owner * len(classes) + labels[np.concatenate(self.clients)]
        return classes.tolist(), np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)

    def statistics(self, column: Column = "topic") -> dict[str, float]:
        """Computes how much the clients differ.

        Returns:
          A row of a table.

          - clients, examples: their numbers; examples that no client holds do not count.
          - smallest, median, largest: numbers of examples per client.
          - size_gini: 0 if all clients hold equally many, towards 1 if one client holds everything.
          - classes: number of classes of the column among the clients' examples.
          - effective_classes: exp(entropy) of a client's classes, mean over clients: the number of
            equally frequent classes with the same entropy.
          - total_variation: half the L1 distance between a client's class shares and those of all
            examples, in [0, 1], mean over clients: the share of its examples that would need another
            class. It is above 0 for small clients even with a random split: compare with `iid`.
        """
        from scipy.special import entr  # here, because it takes a quarter of a second

        sizes, counts = np.sort(self.sizes()), self.counts(column)[1]
        rank = np.arange(1, len(sizes) + 1)
        shares = counts / counts.sum(1, keepdims=True)
        overall = counts.sum(0) / counts.sum()
        return {
            "clients": len(sizes),
            "examples": int(sizes.sum()),
            "smallest": int(sizes[0]),
            "median": float(np.median(sizes)),
            "largest": int(sizes[-1]),
            "size_gini": float(((2 * rank - len(sizes) - 1) * sizes).sum() / sizes.sum())
            / len(sizes),
            "classes": int((overall > 0).sum()),
            "effective_classes": float(np.exp(entr(shares).sum(1)).mean()),
            "total_variation": float(np.abs(shares - overall).sum(1).mean() / 2),
        }


def partition(examples: Sequence[Any], scheme: Scheme, seed: int = 0) -> Partition:
    """Splits examples (questions or passages) over clients; the same seed gives the same clients.

    Raises:
      DataError: no examples; as the scheme.
      ConfigError: more clients than examples.
    """
    if len(examples) == 0:
        raise DataError("partition: there are no examples to split; load some first")
    clients, draw = scheme(examples, seed)
    return Partition(examples, clients, draw)


def values_of(examples: Sequence[Any], column: str) -> list[Any]:
    """Returns an attribute or key of each example.

    Raises:
      DataError: an example without it.
    """
    values = []
    for row, example in enumerate(examples):
        try:
            mapping = isinstance(example, Mapping)
            values.append(example[column] if mapping else getattr(example, column))
        except (KeyError, AttributeError):
            raise DataError(
                f"partition: example {row} has no {column!r}; name a column that all examples have"
            ) from None
    return values


def classes_of(examples: Sequence[Any], column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Returns the C distinct values of a column, sorted, and the class of each example, int [N].

    Raises:
      DataError: an example without the column, not one label per example, or values that are not
        scalars or cannot be sorted.
    """
    named = isinstance(column, str)
    values = values_of(examples, column) if named else column
    what = f"column {column!r}" if named else "the labels given as column"
    if len(values) != len(examples):
        raise DataError(
            f"partition: {what} are {len(values)} for {len(examples)} examples; give one for each"
        )
    try:
        labels = np.asarray(values)
        if labels.ndim == 1:
            return np.unique(labels, return_inverse=True)
    except (TypeError, ValueError):  # values of several kinds, or lists of several lengths
        pass
    raise DataError(
        f"partition: {what} must hold one value for each example, all of one kind; "
        f"the first is {values[0]!r}"
    )
