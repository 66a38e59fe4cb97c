"""Topics for questions that have none: what clients differ in is then where their questions lie."""

import dataclasses
from collections.abc import Sequence

import faiss
import numpy as np

from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.retrieval.retriever import Retriever


def with_topics(dataset: Dataset, retriever: Retriever, clusters: int = 10) -> Dataset:
    """Every question with a topic: its own, or a k-means cluster where it has none.

    Clusters are those of the vectors of training questions without a topic, under the untuned query
    encoder; other questions without a topic join the nearest.
    """
    bare = [e for e in dataset.train if not e.topic]
    if not bare:
        return dataset

    def vectors(examples: Sequence[Example]) -> np.ndarray:
        return retriever.embed_questions([e.question for e in examples])

    known = vectors(bare)
    count = min(clusters, len(known))
    # Fewer than 39 points a cluster make FAISS warn, and they are fine here.
    kmeans = faiss.Kmeans(known.shape[1], count, niter=25, seed=0, min_points_per_centroid=1)
    kmeans.train(known)

    def labelled(examples: Sequence[Example]) -> list[Example]:
        bare = [e for e in examples if not e.topic]
        nearest = kmeans.index.search(vectors(bare), 1)[1][:, 0] if bare else ()
        topics = {e.id: f"cluster {c}" for e, c in zip(bare, nearest, strict=True)}
        return [dataclasses.replace(e, topic=topics.get(e.id, e.topic)) for e in examples]

    splits = {name: labelled(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return dataclasses.replace(dataset, **splits)
