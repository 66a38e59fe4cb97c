import collections
import math

import numpy as np
import pytest

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition, dirichlet, iid, partition
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError

TOPICS = 10
EXAMPLES = [Example(str(i), "q", ("a",), (), topic=f"t{i % TOPICS}") for i in range(1600)]


def largest_share(data: Partition) -> float:
    """How much of a client its commonest topic makes up, mean over clients."""
    counts = data.counts()[1]
    return float((counts.max(1) / counts.sum(1)).mean())


@pytest.mark.parametrize(
    "scheme", [iid(32), dirichlet(0.1, 32), dirichlet(1, 7), dirichlet(math.inf, 32)]
)
def test_every_example_is_with_one_client(scheme):
    data = partition(EXAMPLES, scheme, seed=3)
    assert sorted(np.concatenate(data.clients)) == list(range(1600))


def test_small_alpha_concentrates_and_infinite_alpha_is_iid():
    shares = [largest_share(partition(EXAMPLES, dirichlet(a, 16))) for a in (0.1, 1, math.inf)]
    assert shares[0] > 0.55 > shares[1] > 0.2 > shares[2]
    even = partition(EXAMPLES, dirichlet(math.inf, 31), seed=4)
    assert {len(rows) for rows in even.clients} == {51, 52}
    dealt = partition(EXAMPLES, iid(31), seed=4)
    assert all((a == b).all() for a, b in zip(even.clients, dealt.clients, strict=True))


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


def test_the_seed_decides():
    first, again, other = (partition(EXAMPLES, dirichlet(0.5, 8), s).clients for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) for a, b in zip(first, other, strict=True))


def test_streams_differ_by_seed_name_and_ids():
    streams = [stream(1, "a", 2), stream(2, "a", 2), stream(1, "b", 2), stream(1, "a", 3)]
    assert len({s.integers(2**62) for s in streams}) == 4
    assert stream(1, "a", 2).integers(2**62) == stream(1, "a", 2).integers(2**62)


def test_every_client_gets_the_least_number():
    draws = set()
    for seed in range(5):
        data = partition(EXAMPLES, dirichlet(0.1, 32, min_examples=2), seed)
        assert min(map(len, data.clients)) >= 2
        draws.add(data.draw)
    assert max(draws) > 0  # some first draw was refused, and the one kept is on record


def test_counts_are_a_table_of_clients_and_classes():
    data = Partition(EXAMPLES[:12], (np.array([0, 10, 1]), np.array([2, 3])))
    classes, table = data.counts("topic")
    assert classes == sorted(f"t{i}" for i in range(10))
    for rows, counts in zip(data.clients, table, strict=True):
        expected = collections.Counter(EXAMPLES[r].topic for r in rows)
        assert dict(zip(classes, counts, strict=True)) == {c: expected[c] for c in classes}
    assert [e.id for e in data.of(1)] == ["2", "3"]


def test_mappings_have_columns_too():
    data = partition([{"kind": i % 2} for i in range(40)], dirichlet(1, 2, column="kind"))
    assert data.counts("kind")[1].sum() == 40


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dirichlet(0, 2), ConfigError, "alpha must be > 0, got 0"),
        (lambda: dirichlet(-1, 2), ConfigError, "got -1"),
        (lambda: dirichlet(math.nan, 2), ConfigError, "got nan"),
        (lambda: iid(0), ConfigError, "at least 1, got 0"),
        (lambda: partition([], iid(1)), DataError, "no examples"),
        (lambda: partition(EXAMPLES[:3], iid(4)), ConfigError, "4 clients"),
        (lambda: partition(EXAMPLES[:7], dirichlet(1, 4)), ConfigError, "need 8"),
        (lambda: partition(EXAMPLES, dirichlet(1, 4, "kind")), DataError, "0 has no 'kind'"),
        (lambda: partition(EXAMPLES[:64], dirichlet(0.01, 32)), DataError, "100 draws"),
        (lambda: partition(EXAMPLES, iid(2), seed=-1), ConfigError, "seed must be at least 0"),
        (lambda: Partition(EXAMPLES, ()), DataError, "no clients"),
        (lambda: Partition(EXAMPLES, (np.arange(0),)), DataError, "client 0 has no examples"),
        (lambda: Partition(EXAMPLES, (np.array([1600]),)), DataError, "1600"),
        (lambda: Partition(EXAMPLES, (np.array([1]), np.array([1]))), DataError, "held twice"),
    ],
)
def test_refusals_name_value_and_remedy(call, error, words):
    with pytest.raises(error, match=words):
        call()
