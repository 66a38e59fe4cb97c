"""Passages of one's own: split by themselves, or lying where the questions are."""

import collections

import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.corpora import following
from fedrag_jax.data.examples import Example, Passage
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet, iid, natural
from fedrag_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def world():
    return synthetic.generate()


@pytest.fixture(scope="module")
def questions(world):
    return partition(world.train, dirichlet(alpha=0.1, clients=8))


def owners(passages: Partition) -> dict[str, int]:
    """The client of each passage, by its id."""
    return {p.id: client for client in range(len(passages.clients)) for p in passages.of(client)}


def at_home(questions: Partition, passages: Partition) -> float:
    """Share of questions whose gold passages are all with the client that asks."""
    owner = owners(passages)
    return np.mean(
        [
            all(owner[i] == client for i in e.positive_ids)
            for client in range(len(questions.clients))
            for e in questions.of(client)
        ]
    )


def test_passages_are_split_as_questions_are(world):
    for scheme, clients in ((iid(8), 8), (dirichlet(0.5, 8), 8), (natural(), 11)):
        data = partition(world.passages, scheme)
        assert len(data.clients) == clients and data.sizes().sum() == 2000


@pytest.mark.parametrize("rest", ["topic", "evenly"])
def test_every_gold_passage_is_where_most_of_its_questions_are(world, questions, rest):
    passages = partition(world.passages, following(questions, rest))
    assert sorted(np.concatenate(passages.clients)) == list(range(2000))
    votes = collections.defaultdict(collections.Counter)
    for client in range(8):
        for e in questions.of(client):
            for identifier in e.positive_ids:
                votes[identifier][client] += 1
    owner = owners(passages)
    assert all(count[owner[i]] == max(count.values()) for i, count in votes.items())
    by_chance = at_home(questions, partition(world.passages, iid(8)))
    assert by_chance < 0.2 and at_home(questions, passages) > 0.7


def others(world, questions, rest) -> tuple[list[str], np.ndarray]:
    """Topics, and how many passages that are nobody's gold each client has of them."""
    passages = partition(world.passages, following(questions, rest))
    gold = {i for e in world.train for i in e.positive_ids}
    kept = [[r for r in rows if world.passages[r].id not in gold] for rows in passages.clients]
    return Partition(world.passages, tuple(map(np.array, kept))).counts()


def test_the_rest_is_spread_like_the_questions_of_its_topic(world, questions):
    topics, counts = others(world, questions, "topic")
    asked, held = questions.counts()
    junk = topics.index("")  # nobody asks about it
    assert counts[:, junk].tolist() == [10] * 8
    assert [t for t in topics if t] == asked
    expected = held / held.sum(0) * np.delete(counts.sum(0), junk)
    assert (abs(np.delete(counts, junk, axis=1) - expected) < 1).all()


def test_the_rest_is_spread_evenly(world, questions):
    sizes = others(world, questions, "evenly")[1].sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_the_seed_decides_between_equals():
    examples = [Example(f"q{i}", "?", ("a",), ("p",)) for i in range(2)]
    asked = Partition(examples, (np.array([0]), np.array([1])))
    passages = [Passage(i, "", "") for i in ("p", "x", "y")]
    found = {owners(partition(passages, following(asked), seed))["p"] for seed in range(20)}
    assert found == {0, 1}
    first, again = (partition(passages, following(asked), 3).clients for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_each_client_gets_the_least_number():
    """Three passages, one of them gold for all three clients: some draw gives one to each."""
    examples = [Example(f"q{i}", "?", ("a",), ("p",)) for i in range(3)]
    asked = Partition(examples, tuple(np.array([i]) for i in range(3)))
    passages = [Passage(i, "", "") for i in "pxy"]
    for seed in range(10):
        data = partition(passages, following(asked, "evenly"), seed)
        assert data.sizes().tolist() == [1, 1, 1]


def test_refusals_name_value_and_remedy(world, questions):
    with pytest.raises(ConfigError, match=r"'topic' or 'evenly', got 'nowhere'"):
        following(questions, "nowhere")
    with pytest.raises(ConfigError, match=r"8 clients .* need 8"):
        partition(world.passages[:7], following(questions))
    with pytest.raises(DataError, match=r"question \d+ has positive id .* give the whole corpus"):
        partition(world.passages[:100], following(questions))
    bare = Partition([Example("q", "?", ("a",), ())], (np.array([0]),))
    with pytest.raises(DataError, match="no question has positive_ids"):
        partition(world.passages, following(bare))
    with pytest.raises(DataError, match=r"100 draws .* spread the rest 'evenly'"):
        partition(world.passages, following(questions, min_examples=200))
