"""Topics out of question vectors, for data that has none."""

import dataclasses

import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset
from fedrag_jax.data.partition import partition
from fedrag_jax.data.schemes import natural
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.models import hub
from fedrag_jax.retrieval.clusters import kmeans_labels, with_topics
from fedrag_jax.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def world():
    whole = synthetic.generate()
    return Dataset("some", whole.passages[:50], whole.train[:200], [], whole.test[:40])


@pytest.fixture(scope="module")
def retriever(world):
    return Retriever.build(hub.load("builtin:encoder"), world.passages)


def bare(dataset):
    """The dataset without topics."""
    splits = {
        name: [dataclasses.replace(e, topic="") for e in getattr(dataset, name)]
        for name in ("train", "validation", "test")
    }
    return dataclasses.replace(dataset, **splits)


def test_known_topics_stay(world, retriever):
    assert with_topics(world, retriever) is world


def test_each_question_joins_the_nearest_centre(world, retriever):
    found = with_topics(bare(world), retriever, clusters=4)
    assert len({e.topic for e in found.train}) == 4
    assert [e.id for e in found.train + found.test] == [e.id for e in world.train + world.test]
    vectors = {e.id: retriever.embed_questions([e.question])[0] for e in found.train + found.test}
    groups = {e.topic for e in found.train}
    centres = {
        t: np.mean([vectors[e.id] for e in found.train if e.topic == t], axis=0) for t in groups
    }
    nearest = [
        min(centres, key=lambda t, v=vectors[e.id]: np.sum((centres[t] - v) ** 2))
        for e in found.train + found.test
    ]
    # k-means is a fixed point of this rule up to its last iteration.
    assert (
        np.mean([n == e.topic for n, e in zip(nearest, found.train + found.test, strict=True)])
        > 0.9
    )
    assert with_topics(bare(world), retriever, clusters=4) == found


def test_a_topic_that_is_known_stays_beside_clusters(world, retriever):
    """Clusters come of the questions without a topic alone: those with one could be left out."""
    both = {
        name: [
            dataclasses.replace(e, topic="") if i % 2 else e
            for i, e in enumerate(getattr(world, name))
        ]
        for name in ("train", "validation", "test")
    }
    only = {name: [e for e in examples if not e.topic] for name, examples in both.items()}
    mixed, alone = (
        with_topics(dataclasses.replace(world, **splits), retriever, clusters=4)
        for splits in (both, only)
    )
    for name in both:
        found, asked = getattr(mixed, name), getattr(world, name)
        assert [e.topic for e in found[::2]] == [e.topic for e in asked[::2]]
        assert found[1::2] == getattr(alone, name)
    assert {e.topic for e in alone.train} == {f"cluster {i}" for i in range(4)}


def test_clusters_know_nothing_of_the_test_questions(world, retriever):
    unseen = dataclasses.replace(bare(world), test=[])
    found = with_topics(bare(world), retriever, clusters=4)
    assert with_topics(unseen, retriever, clusters=4).train == found.train


def test_no_more_clusters_than_questions(world, retriever):
    few = dataclasses.replace(bare(world), train=bare(world).train[:3])
    assert len({e.topic for e in with_topics(few, retriever).train}) <= 3


def test_labels_of_any_vectors_are_their_clouds():
    rng = np.random.default_rng(0)
    cloud = np.repeat(np.arange(3), 50)
    vectors = 10 * np.eye(3)[cloud] + rng.normal(size=(150, 3))
    labels = kmeans_labels(vectors, clusters=3)
    assert len({*zip(cloud, labels, strict=True)}) == len({*labels}) == 3
    assert (kmeans_labels(vectors, clusters=3) == labels).all()
    # Centres of the first two clouds alone: the third joins one or both of them.
    assert len({*kmeans_labels(vectors, 2, centres_of=vectors[:100])[:100]}) == 2
    assert len({*kmeans_labels(vectors[:2], clusters=9)}) == 2


def test_clients_differ_in_clusters_of_passages(world, retriever):
    labels = kmeans_labels(retriever.vectors, clusters=4)
    data = partition(world.passages, natural(labels))
    assert len(data.clients) == 4 and data.sizes().sum() == 50


@pytest.mark.parametrize(
    ("vectors", "clusters", "error", "words"),
    [
        (np.ones((3, 2)), 0, ConfigError, "at least 1, got 0"),
        (np.ones(3), 2, DataError, r"\[N, D\], got shape \(3,\)"),
        (np.ones((0, 2)), 2, DataError, r"shape \(0, 2\)"),
        (np.array([[1.0, np.nan]]), 2, DataError, "1 numbers that are not"),
    ],
)
def test_what_cannot_be_clustered_is_refused(vectors, clusters, error, words):
    with pytest.raises(error, match=words):
        kmeans_labels(vectors, clusters)
