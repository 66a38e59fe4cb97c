"""Schemes for splitting examples over clients: each function returns a `Scheme` for `partition`.

    partition(world.train, dirichlet(alpha=0.1, clients=32), seed=0)

| scheme | clients differ in |
|---|---|
| `iid` | nothing |
| `dirichlet` | classes and sizes: each class is split separately |
| `dirichlet_per_client` | classes: each client has its own mixture, all sizes are equal |
| `shards` | classes: each client has a few pieces of the examples sorted by class |
| `natural` | a column of the data: one client per value |
| `quantity_skew` | sizes |

`column` is an attribute or key of every example, or an array of labels, one per example, such as the
clusters of `retrieval.clusters.kmeans_labels`. Random splits are drawn again, up to 100 times, until
each client has `min_examples`; alpha = inf is IID. Passages can be split like questions, or follow the
questions (`corpora.following`).
"""

import math
from collections.abc import Callable

import numpy as np

from fedrag_jax.data.partition import Column, Scheme, classes_of
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError

MAX_DRAWS = 100


def iid(clients: int, min_examples: int = 1) -> Scheme:
    """Shuffles examples and splits them evenly: client sizes differ by at most one.

    Raises:
      ConfigError: fewer than one client, or too few examples for the clients.
    """
    require_positive(clients=clients, min_examples=min_examples)

    def split(examples, seed):
        require_enough(examples, clients, min_examples)
        order = stream(seed, "partition").permutation(len(examples))
        return tuple(np.sort(rows) for rows in np.array_split(order, clients)), 0

    return split


def dirichlet(
    alpha: float, clients: int, column: Column = "topic", min_examples: int = 2
) -> Scheme:
    """Label skew per class: each class is split over clients in proportions ~ Dir(alpha).

    This is the per-class form (Yurochkin et al. 2019, arXiv 1905.12022) of Hsu, Qi and Brown 2019
    (1909.06335), as in Li et al. 2021 (2102.02079). Client sizes differ too.

    Args:
      alpha: concentration > 0 of each client; 0.1 gives each client few classes, `inf` is IID.
      column: attribute or key of an example that holds its class, or the N classes themselves.
      min_examples: minimum examples per client; the split is drawn again, up to 100 times.

    Raises:
      ConfigError: alpha not > 0, fewer than one client, or too few examples for the clients.
      DataError: an example without the column, or no draw among 100 with `min_examples` for all.
    """

    def split(examples, seed):
        labels = classes_of(examples, column)[1]
        rows_of_class = _grouped(labels, labels.max() + 1)

        def owners(rng):
            owner = np.empty(len(examples), int)
            for rows in rows_of_class:
                rows = rng.permutation(rows)
                shares = rng.dirichlet(np.full(clients, alpha))
                owner[rows] = np.repeat(np.arange(clients), cut(shares, len(rows)))
            return owner

        where = f"dirichlet(alpha={alpha}, clients={clients})"
        return redrawn(owners, clients, min_examples, seed, where, "raise alpha")

    return _skewed("dirichlet", alpha, clients, min_examples, split)


def dirichlet_per_client(
    alpha: float, clients: int, column: Column = "topic", min_examples: int = 2
) -> Scheme:
    """Label skew per client: each client draws a mixture of classes ~ Dir(alpha · class shares).

    Hsu, Qi and Brown 2019 (arXiv 1909.06335). Client sizes differ by at most one. A client takes
    examples by its mixture; if a class is exhausted, it uses the rest of its mixture. Clients do so in
    random order, so the last ones have little choice.

    Args:
      alpha: concentration > 0 of all classes together: with C equal classes, each has alpha / C. Near
        0 a client has one class while it lasts, `inf` is IID.
      column: attribute or key of an example that holds its class, or the N classes themselves.

    Raises:
      ConfigError: alpha not > 0, fewer than one client, or too few examples for the clients.
      DataError: an example without the column.
    """

    def split(examples, seed):
        labels = classes_of(examples, column)[1]
        rng = stream(seed, "partition")
        held, sizes = np.bincount(labels), cut(np.full(clients, 1 / clients), len(examples))
        table = _filled(sizes, held, alpha * held / len(examples), rng)
        owner = np.empty(len(examples), int)
        # Class after class, each shuffled: client 0 takes its number, then client 1, and so on.
        numbers = np.tile(np.arange(clients), table.shape[1])
        owner[_sorted_by_class(labels, rng)] = np.repeat(numbers, table.T.ravel())
        return _grouped(owner, clients), 0

    return _skewed("dirichlet_per_client", alpha, clients, min_examples, split)


def shards(
    clients: int, per_client: int = 2, column: Column = "topic", min_examples: int = 2
) -> Scheme:
    """Pathological label skew: examples sorted by class, split into equal shards, a few per client.

    McMahan et al. 2017 (arXiv 1602.05629). A shard may span several classes; a client has at most
    `per_client` classes, plus one for each class border within its shards.

    Args:
      per_client: shards per client; shard sizes differ by at most one example.
      column: attribute or key of an example that holds its class, or the N classes themselves.

    Raises:
      ConfigError: fewer than one client or shard, or too few examples for the clients.
      DataError: an example without the column, or no draw among 100 with `min_examples` for all.
    """
    require_positive(clients=clients, per_client=per_client, min_examples=min_examples)

    def split(examples, seed):
        require_enough(examples, clients, min_examples)
        labels = classes_of(examples, column)[1]
        pieces = clients * per_client
        sizes = cut(np.full(pieces, 1 / pieces), len(examples))

        def owners(rng):
            owner = np.empty(len(examples), int)
            of_shard = rng.permutation(np.repeat(np.arange(clients), per_client))
            owner[_sorted_by_class(labels, rng)] = np.repeat(of_shard, sizes)
            return owner

        where = f"shards(clients={clients}, per_client={per_client})"
        return redrawn(owners, clients, min_examples, seed, where, "lower per_client")

    return split


def natural(column: Column = "topic", min_examples: int = 1, small: str = "refuse") -> Scheme:
    """One client per value of a column, such as the author or source, in the order of values.

    The natural split of LEAF (Caldas et al. 2018, arXiv 1812.01097); it is deterministic.

    Args:
      column: attribute or key of an example that names its client, or the N names themselves.
      small: treatment of values with fewer than `min_examples`: "refuse", "drop" (no client holds
        them), or "merge" (from the smallest up, until they have enough together; a remaining group that
        is too small joins the smallest of the others).

    Raises:
      ConfigError: an unknown `small`.
      DataError: an example without the column, a small value if they are refused, or nothing left.
    """
    require_positive(min_examples=min_examples)
    if small not in ("refuse", "drop", "merge"):
        raise ConfigError(f"natural: small must be 'refuse', 'drop' or 'merge', got {small!r}")

    def split(examples, seed):
        values, labels = classes_of(examples, column)
        sizes = np.bincount(labels)
        if small == "refuse" and sizes.min() < min_examples:
            raise DataError(
                f"natural: {values.tolist()[sizes.argmin()]!r} has {sizes.min()} examples, fewer than "
                f"min_examples={min_examples}; lower it, or set small to 'drop' or 'merge'"
            )
        if sizes.max() < min_examples and (small == "drop" or len(examples) < min_examples):
            raise DataError(
                f"natural: none of {len(sizes)} values has {min_examples} examples, the largest has "
                f"{sizes.max()}; lower min_examples"
            )
        groups = _grouped(labels, len(values))
        if small == "drop":
            return tuple(rows for rows in groups if len(rows) >= min_examples), 0
        merged = _merged(sizes, min_examples)
        return _grouped(merged[labels], merged.max() + 1), 0

    return split


def quantity_skew(alpha: float, clients: int, min_examples: int = 2) -> Scheme:
    """Size skew only: client sizes ~ Dir(alpha), examples assigned at random.

    Li et al. 2021 (arXiv 2102.02079).

    Args:
      alpha: concentration > 0 of each client; below 1 a few clients hold most, `inf` is IID.
      min_examples: minimum examples per client; the split is drawn again, up to 100 times.

    Raises:
      ConfigError: alpha not > 0, fewer than one client, or too few examples for the clients.
      DataError: no draw among 100 with `min_examples` for all.
    """

    def split(examples, seed):
        def owners(rng):
            sizes = cut(rng.dirichlet(np.full(clients, alpha)), len(examples))
            return rng.permutation(np.repeat(np.arange(clients), sizes))

        where = f"quantity_skew(alpha={alpha}, clients={clients})"
        return redrawn(owners, clients, min_examples, seed, where, "raise alpha")

    return _skewed("quantity_skew", alpha, clients, min_examples, split)


def _skewed(name: str, alpha: float, clients: int, min_examples: int, split: Scheme) -> Scheme:
    """Returns the split with its settings checked; alpha = inf is IID."""
    if not alpha > 0:
        raise ConfigError(f"{name}: alpha must be > 0, got {alpha}; use inf for IID clients")
    if math.isinf(alpha):
        return iid(clients, min_examples)
    require_positive(clients=clients, min_examples=min_examples)

    def checked(examples, seed):
        require_enough(examples, clients, min_examples)
        return split(examples, seed)

    return checked


def redrawn(
    owners: Callable[[np.random.Generator], np.ndarray],
    clients: int,
    min_examples: int,
    seed: int,
    where: str,
    remedy: str,
):
    """Returns the first of up to 100 draws in which every client has enough examples.

    Args:
      owners: function that draws the client of each example, int [N].
    """
    owner = np.zeros(0, int)
    for draw in range(MAX_DRAWS):
        owner = owners(stream(seed, "partition", draw))
        if np.bincount(owner, minlength=clients).min() >= min_examples:
            return _grouped(owner, clients), draw
    raise DataError(
        f"{where}: in {MAX_DRAWS} draws from seed {seed} some client always had fewer than "
        f"{min_examples} of the {len(owner)} examples; {remedy}, use fewer clients, "
        "or lower min_examples"
    )


def _grouped(owner: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    """Returns the rows of each client, ascending, given the client of each row [N]."""
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return tuple(np.split(np.argsort(owner, kind="stable"), ends[:-1]))


def _sorted_by_class(labels: np.ndarray, rng) -> np.ndarray:
    """Returns all rows, sorted by class and shuffled within a class."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def cut(shares: np.ndarray, total: int) -> np.ndarray:
    """Returns integers [K] with sum `total`, in proportion to shares [K] with sum 1."""
    ends = np.round(np.cumsum(shares)[:-1] * total).astype(int)
    return np.diff(ends, prepend=0, append=total)


def _filled(sizes: np.ndarray, left: np.ndarray, concentration: np.ndarray, rng) -> np.ndarray:
    """Returns the number of examples of each class that a client takes by its mixture, int [K, C].

    Args:
      sizes: [K] client sizes, whose sum equals the sum of class sizes.
      left: [C] class sizes.
      concentration: [C] Dirichlet concentration of the mixtures.
    """
    table, left = np.zeros((len(sizes), len(left)), int), left.copy()
    for client in rng.permutation(len(sizes)):
        mixture = rng.dirichlet(concentration)
        while missing := sizes[client] - table[client].sum():
            wanted = mixture * (left > 0)
            if not wanted.sum():  # as numbers go: the rest of a Dirichlet is one of the rest
                wanted[left > 0] = rng.dirichlet(concentration[left > 0])
            taken = np.minimum(rng.multinomial(missing, wanted / wanted.sum()), left)
            table[client] += taken
            left -= taken
    return table


def _merged(sizes: np.ndarray, least: int) -> np.ndarray:
    """Returns the client of each value, int [C]; the smallest values are merged until they have
    enough."""
    client, held = np.zeros(len(sizes), int), [0]
    for value in np.argsort(sizes, kind="stable"):
        client[value] = len(held) - 1
        held[-1] += sizes[value]
        if held[-1] >= least:
            held.append(0)
    if len(held) > 1:
        client[client == len(held) - 1] = np.argmin(held[:-1])
    first = np.unique(client, return_index=True)[1]
    return np.argsort(np.argsort(first))[client]


def require_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"partition: {name} must be at least 1, got {value}")


def require_enough(examples, clients: int, each: int) -> None:
    if clients * each > len(examples):
        raise ConfigError(
            f"partition: {clients} clients with at least {each} each need {clients * each} "
            f"examples, got {len(examples)}; take fewer clients"
        )
