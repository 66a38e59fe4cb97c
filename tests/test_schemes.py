"""Each way to split examples among clients has the properties of its paper."""

import math
import time

import numpy as np
import pytest

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import (
    dirichlet,
    dirichlet_per_client,
    iid,
    natural,
    quantity_skew,
    shards,
)
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError

TOPICS = 10
EXAMPLES = [Example(str(i), "q", ("a",), (), topic=f"t{i % TOPICS}") for i in range(1600)]
SCHEMES = {
    "iid": iid(32),
    "dirichlet": dirichlet(0.1, 32),
    "dirichlet of few": dirichlet(1, 7),
    "dirichlet that is IID": dirichlet(math.inf, 32),
    "dirichlet_per_client": dirichlet_per_client(0.1, 31),
    "dirichlet_per_client near 0": dirichlet_per_client(1e-3, 31),
    "dirichlet_per_client that is IID": dirichlet_per_client(math.inf, 32),
    "shards": shards(31, 3),
    "natural": natural(),
    "natural, merged": natural(np.arange(1600) // 3, 4, "merge"),
    "quantity_skew": quantity_skew(1, 32),
    "quantity_skew that is IID": quantity_skew(math.inf, 32),
}


def largest_share(data: Partition) -> float:
    """How much of a client its commonest topic makes up, mean over clients."""
    counts = data.counts()[1]
    return float((counts.max(1) / counts.sum(1)).mean())


def equal(one: Partition, other: Partition) -> bool:
    return len(one.clients) == len(other.clients) and all(
        np.array_equal(a, b) for a, b in zip(one.clients, other.clients, strict=True)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_example_is_with_one_client(name):
    data = partition(EXAMPLES, SCHEMES[name], seed=3)
    assert sorted(np.concatenate(data.clients)) == list(range(1600))
    assert all((np.diff(rows) > 0).all() for rows in data.clients)


@pytest.mark.parametrize("name", [name for name in SCHEMES if "natural" not in name])
def test_the_seed_decides(name):
    first, again, other = (partition(EXAMPLES, SCHEMES[name], s) for s in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)


def test_labels_do_as_well_as_a_column():
    labels = [e.topic for e in EXAMPLES]
    for scheme in (
        lambda column: dirichlet(0.3, 8, column),
        lambda column: dirichlet_per_client(0.3, 8, column),
        lambda column: shards(8, 2, column),
        lambda column: natural(column),
    ):
        named = partition(EXAMPLES, scheme("topic"), 5)
        assert equal(named, partition(EXAMPLES, scheme(labels), 5))
        # Numbers of clusters beside anything with a length: here not even examples.
        numbers = np.array([int(label[1:]) for label in labels])
        assert equal(named, partition(range(1600), scheme(numbers), 5))
    data = partition([{"kind": i % 2} for i in range(40)], dirichlet(1, 2, column="kind"))
    assert data.counts("kind")[1].sum() == 40


def test_small_alpha_concentrates_and_infinite_alpha_is_iid():
    shares = [largest_share(partition(EXAMPLES, dirichlet(a, 16))) for a in (0.1, 1, math.inf)]
    assert shares[0] > 0.55 > shares[1] > 0.2 > shares[2]
    dealt = partition(EXAMPLES, iid(31), seed=4)
    assert set(dealt.sizes()) == {51, 52}
    for scheme in (dirichlet, dirichlet_per_client, quantity_skew):
        assert equal(dealt, partition(EXAMPLES, scheme(math.inf, 31), seed=4))


def test_a_known_split_stays_what_it_was():
    """Published numbers depend on it."""
    data = partition(EXAMPLES[:40], dirichlet(0.3, 3), seed=7)
    assert [(len(rows), rows.sum()) for rows in data.clients] == [(11, 222), (15, 257), (14, 301)]
    assert partition(EXAMPLES[:9], iid(3), seed=7).clients[0].tolist() == [3, 5, 6]


def test_proportions_of_a_class_follow_the_dirichlet():
    # Var[p] of Dir(alpha 1_K) is (K-1) / (K^2 (K alpha + 1)).
    alpha, clients = 0.5, 4
    shares = np.concatenate(
        [
            partition(EXAMPLES, dirichlet(alpha, clients), seed).counts()[1] / (1600 / TOPICS)
            for seed in range(40)
        ]
    )
    assert shares.mean() == pytest.approx(1 / clients)
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.var() == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("alpha", [0.3, 3])
def test_mixtures_of_clients_follow_the_dirichlet(alpha):
    # q ~ Dir(alpha p): E[q] = p, Var[q] = p (1 - p) / (alpha + 1); drawing n examples adds the mean
    # of q (1 - q) / n. Many clients, so that no class runs out long before the others.
    prior, n = np.array([0.5, 0.3, 0.2]), 50
    labels = np.repeat(np.arange(3), (prior * 60_000).astype(int))
    shares = (
        partition(labels, dirichlet_per_client(alpha, 60_000 // n, labels)).counts(labels)[1] / n
    )
    assert shares.mean(0) == pytest.approx(prior)
    variance = prior * (1 - prior) / (alpha + 1)
    variance += (prior * (1 - prior) - variance) / n
    assert shares.var(0) == pytest.approx(variance, rel=0.12)


def test_clients_of_mixtures_are_of_one_size_and_none_is_always_last():
    mixed = []
    for seed in range(20):
        data = partition(EXAMPLES, dirichlet_per_client(1e-9, 7), seed)
        assert set(data.sizes()) == {228, 229}
        classes = (data.counts()[1] > 0).sum(1)
        # One class after the other: a client goes on to the next only where one has run out.
        assert classes.sum() <= 7 + TOPICS - 1
        mixed.append(classes.argmax())
    assert len(set(mixed)) > 3  # those who came late, and have what others left


def test_a_client_of_shards_has_as_many_classes_as_shards():
    """160 examples a class: four shards of 40, so that none straddles."""
    data = partition(EXAMPLES, shards(20, 2), seed=1)
    counts = data.counts()[1]
    assert set(data.sizes()) == {80}
    assert set(np.unique(counts)) <= {0, 40, 80}
    assert (counts > 0).sum(1).max() == 2
    straddling = partition(EXAMPLES, shards(7, 3), seed=1)
    classes = (straddling.counts()[1] > 0).sum(1)
    assert classes.max() <= 2 * 3 and classes.sum() <= 7 * 3 + TOPICS - 1
    assert set(straddling.sizes()) <= {3 * 76 + extra for extra in range(4)}
    # Within a class, rows are dealt at random: the first shard is not that of the first rows.
    one = partition(EXAMPLES, shards(20, 2), seed=2)
    assert not {tuple(rows) for rows in data.clients} & {tuple(rows) for rows in one.clients}


def test_one_client_for_each_value():
    data = partition(EXAMPLES, natural())
    assert (data.counts()[1] == 160 * np.eye(TOPICS)).all()


@pytest.mark.parametrize(
    ("least", "small", "clients"),
    [
        (1, "refuse", ["a", "bb", "ccc", "dddd"]),
        (3, "drop", ["ccc", "dddd"]),
        (3, "merge", ["abb", "ccc", "dddd"]),
        (4, "merge", ["abbccc", "dddd"]),
        (5, "merge", ["abbccc" + "dddd"]),
        (2, "merge", ["abb", "ccc", "dddd"]),
    ],
)
def test_small_values_are_dropped_or_merged(least, small, clients):
    letters = "dcbdcdabcd"
    data = partition(list(letters), natural(list(letters), least, small))
    assert ["".join(sorted(data.of(client))) for client in range(len(clients))] == clients


def test_a_rest_that_is_too_small_joins_the_smallest():
    letters = "abbccddee"
    data = partition(list(letters), natural(list(letters), 3, "merge"))
    assert ["".join(data.of(client)) for client in range(2)] == ["abbee", "ccdd"]


def test_sizes_follow_the_dirichlet_and_labels_do_not():
    alpha, clients = 0.5, 8
    scheme = quantity_skew(alpha, clients, min_examples=1)
    found = [partition(EXAMPLES, scheme, seed) for seed in range(200)]
    shares = np.stack([data.sizes() for data in found]) / 1600
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.mean(0) == pytest.approx(np.full(clients, 1 / clients), rel=0.25)
    assert shares.var() == pytest.approx(expected, rel=0.12)
    # Topics by chance: chi squared of a table of K clients and C topics is (K - 1) (C - 1) on average.
    counts = np.concatenate([data.counts()[1] for data in found]).astype(float)
    wanted = counts.sum(1, keepdims=True) / TOPICS
    chi_squared = ((counts - wanted) ** 2 / wanted).sum() / len(found)
    assert chi_squared == pytest.approx((clients - 1) * (TOPICS - 1), rel=0.05)


@pytest.mark.parametrize(
    "scheme", [dirichlet(0.1, 32, min_examples=3), quantity_skew(1, 32, min_examples=3)]
)
def test_every_client_gets_the_least_number(scheme):
    draws = set()
    for seed in range(5):
        data = partition(EXAMPLES, scheme, seed)
        assert data.sizes().min() >= 3
        draws.add(data.draw)
    assert max(draws) > 0  # some first draw was refused, and the one kept is on record


def test_ten_thousand_clients_take_no_time():
    labels = np.arange(1_000_000) % 10
    start = time.process_time()
    data = partition(labels, dirichlet(2, 10_000, labels))
    assert len(data.clients) == 10_000
    assert time.process_time() - start < 5


def test_streams_differ_by_seed_name_and_ids():
    streams = [stream(1, "a", 2), stream(2, "a", 2), stream(1, "b", 2), stream(1, "a", 3)]
    assert len({s.integers(2**62) for s in streams}) == 4
    assert stream(1, "a", 2).integers(2**62) == stream(1, "a", 2).integers(2**62)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dirichlet(0, 2), ConfigError, "dirichlet: alpha must be > 0, got 0"),
        (lambda: dirichlet(-1, 2), ConfigError, "got -1"),
        (lambda: dirichlet(math.nan, 2), ConfigError, "got nan"),
        (lambda: dirichlet_per_client(0, 2), ConfigError, "per_client: alpha must be > 0, got 0"),
        (lambda: quantity_skew(-1, 2), ConfigError, "quantity_skew: alpha must be > 0, got -1"),
        (lambda: iid(0), ConfigError, "clients must be at least 1, got 0"),
        (lambda: dirichlet(1, 2, min_examples=0), ConfigError, "min_examples must be at least 1"),
        (lambda: shards(2, 0), ConfigError, "per_client must be at least 1, got 0"),
        (lambda: natural(small="keep"), ConfigError, "'merge', got 'keep'"),
        (lambda: partition(EXAMPLES[:3], iid(4)), ConfigError, "4 clients"),
        (lambda: partition(EXAMPLES[:3], iid(2, 2)), ConfigError, "need 4"),
        (lambda: partition(EXAMPLES[:7], dirichlet(1, 4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES[:7], dirichlet(math.inf, 4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES[:7], dirichlet_per_client(1, 4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES[:7], quantity_skew(1, 4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES[:7], shards(4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES, dirichlet(1, 4, "kind")), DataError, "0 has no 'kind'"),
        (lambda: partition(EXAMPLES, natural("kind")), DataError, "0 has no 'kind'"),
        (lambda: partition(EXAMPLES, shards(4, 2, [1, 2])), DataError, "are 2 for 1600 examples"),
        (lambda: partition(EXAMPLES[:64], dirichlet(0.01, 32)), DataError, "100 draws"),
        (lambda: partition(EXAMPLES[:64], quantity_skew(0.01, 32)), DataError, "raise alpha"),
        (lambda: partition(EXAMPLES, shards(400, 99, min_examples=4)), DataError, "100 draws"),
        (lambda: partition(EXAMPLES[:15], natural("topic", 2)), DataError, "'t5' has 1 examples"),
        (lambda: partition(EXAMPLES[:15], natural("topic", 3, "drop")), DataError, "largest has 2"),
        (lambda: partition(EXAMPLES[:15], natural("topic", 16, "merge")), DataError, "none of 10"),
        (lambda: partition(EXAMPLES, iid(2), seed=-1), ConfigError, "seed must be at least 0"),
    ],
)
def test_refusals_name_value_and_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()
