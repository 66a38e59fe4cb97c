"""What a partition says of itself."""

import collections
import math

import numpy as np
import pytest

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet, dirichlet_per_client, iid
from fedrag_jax.errors import DataError

EXAMPLES = [Example(str(i), "q", ("a",), (), topic=f"t{i % 10}") for i in range(1600)]


def split(*clients: list[int]) -> Partition:
    """Clients who hold the rows given, of examples whose labels are 0, 0, 0, 0, 1, 1, 1, 1."""
    return Partition(range(8), tuple(map(np.array, clients)))


LABELS = np.arange(8) // 4


def test_counts_are_a_table_of_clients_and_classes():
    data = Partition(EXAMPLES[:12], (np.array([0, 10, 1]), np.array([2, 3])))
    classes, table = data.counts("topic")
    assert classes == sorted(f"t{i}" for i in range(10))
    for rows, counts in zip(data.clients, table, strict=True):
        expected = collections.Counter(EXAMPLES[r].topic for r in rows)
        assert dict(zip(classes, counts, strict=True)) == {c: expected[c] for c in classes}
    assert [e.id for e in data.of(1)] == ["2", "3"]
    assert data.sizes().tolist() == [3, 2]


def test_labels_may_lie_beside_the_examples():
    data = split([0, 1, 4], [7])
    assert data.counts(LABELS)[1].tolist() == [[2, 1], [0, 1]]
    assert data.counts(["b"] * 4 + ["a"] * 4)[0] == ["a", "b"]
    named = [{"kind": int(label)} for label in LABELS]
    assert Partition(named, data.clients).counts("kind")[1].tolist() == [[2, 1], [0, 1]]


def test_statistics_of_clients_all_alike_and_of_clients_with_a_class_each():
    alike = split([0, 1, 4, 5], [2, 3, 6, 7]).statistics(LABELS)
    apart = split([0, 1, 2, 3], [4, 5, 6, 7]).statistics(LABELS)
    same = {"clients": 2, "examples": 8, "smallest": 4, "median": 4, "largest": 4, "classes": 2}
    assert alike == same | {"size_gini": 0, "effective_classes": 2, "total_variation": 0}
    assert apart == same | {"size_gini": 0, "effective_classes": 1, "total_variation": 0.5}


def test_statistics_by_hand():
    found = split([0, 1, 2, 4], [5]).statistics(LABELS)  # of five held examples 3 are of class 0
    assert (found["examples"], found["smallest"], found["largest"]) == (5, 1, 4)
    # Mean difference of all pairs of sizes over twice their mean: (3 + 3) / 4 / (2 · 2.5).
    assert found["size_gini"] == pytest.approx(0.3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["effective_classes"] == pytest.approx((math.exp(entropy) + 1) / 2)
    assert found["total_variation"] == pytest.approx((0.15 + 0.6) / 2)


def test_statistics_tell_schemes_apart():
    found = [
        partition(EXAMPLES, scheme).statistics()
        for scheme in (iid(16), dirichlet(1, 16), dirichlet(0.1, 16), dirichlet_per_client(0.1, 16))
    ]
    variation = [f["total_variation"] for f in found]
    assert variation[0] < 0.15 < variation[1] < 0.5 < variation[2] < variation[3]
    assert found[3]["size_gini"] == 0 < found[0]["size_gini"] + 0.1 < found[2]["size_gini"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: partition([], iid(1)), "no examples"),
        (lambda: Partition(EXAMPLES, ()), "no clients"),
        (lambda: Partition(EXAMPLES, (np.arange(0),)), "client 0 has no examples"),
        (lambda: Partition(EXAMPLES, (np.array([1600]),)), "1600"),
        (lambda: Partition(EXAMPLES, (np.array([-1]),)), "from -1"),
        (lambda: Partition(EXAMPLES, (np.array([7]), np.array([1, 7]))), "example 7 is held twice"),
        (lambda: split([0]).counts(LABELS[:5]), "are 5 for 8 examples"),
        (lambda: split([0]).counts([0, None, "a", 1, 2, 3, 4, 5]), "all of one kind"),
        (lambda: Partition(EXAMPLES, (np.arange(3),)).counts("answers"), r"one value .*\('a',\)"),
        (lambda: split([0]).counts("topic"), "example 0 has no 'topic'"),
    ],
)
def test_refusals_name_value_and_remedy(call, words):
    with pytest.raises(DataError, match=words):
        call()
