"""Topics for questions that have none: what clients differ in is then where their questions lie."""

import dataclasses
from collections.abc import Sequence

import faiss
import numpy as np

from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.retrieval.retriever import Retriever


def with_topics(dataset: Dataset, retriever: Retriever, clusters: int = 10) -> Dataset:
    """The dataset as it is if a training question has a topic; else with k-means clusters for topics.

    Clusters are those of the training questions' vectors under the untuned query encoder; other
    questions join the nearest.
    """
    if any(e.topic for e in dataset.train):
        return dataset

    def vectors(examples: Sequence[Example]) -> np.ndarray:
        return retriever.embed_questions([e.question for e in examples])

    known = vectors(dataset.train)
    count = min(clusters, len(known))
    # Fewer than 39 points a cluster make FAISS warn, and they are fine here.
    kmeans = faiss.Kmeans(known.shape[1], count, niter=25, seed=0, min_points_per_centroid=1)
    kmeans.train(known)

    def labelled(examples: Sequence[Example], found: np.ndarray) -> list[Example]:
        labels = kmeans.index.search(found, 1)[1][:, 0]
        return [
            dataclasses.replace(e, topic=f"cluster {c}")
            for e, c in zip(examples, labels, strict=True)
        ]

    others = {
        name: labelled(examples, vectors(examples))
        for name in ("validation", "test")
        if (examples := getattr(dataset, name))
    }
    return dataclasses.replace(dataset, train=labelled(dataset.train, known), **others)
