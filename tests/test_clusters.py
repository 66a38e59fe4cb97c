"""Topics out of question vectors, for data that has none."""

import dataclasses

import numpy as np
import pytest

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Dataset
from fedrag_jax.models import hub
from fedrag_jax.retrieval.clusters import with_topics
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


def test_no_more_clusters_than_questions(world, retriever):
    few = dataclasses.replace(bare(world), train=bare(world).train[:3])
    assert len({e.topic for e in with_topics(few, retriever).train}) <= 3
