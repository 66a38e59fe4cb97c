"""Topics for questions that have none: what clients differ in is then where their questions lie."""

import dataclasses

import faiss

from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.retrieval.retriever import Retriever


def with_topics(dataset: Dataset, retriever: Retriever, clusters: int = 10) -> Dataset:
    """Every question with a topic: its own, or a k-means cluster where it has none.

    Clusters are those of the vectors of training questions without a topic, under the untuned query
    encoder; other questions without a topic join the nearest.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    if all(e.topic for e in dataset.train):
        return dataset
    bare = [e for examples in splits.values() for e in examples if not e.topic]
    vectors = retriever.embed_questions([e.question for e in bare])
    known = vectors[: sum(not e.topic for e in dataset.train)]
    # Fewer than 39 points a cluster make FAISS warn, and they are fine here.
    count = min(clusters, len(known))
    kmeans = faiss.Kmeans(known.shape[1], count, niter=25, seed=0, min_points_per_centroid=1)
    kmeans.train(known)
    nearest = iter(kmeans.index.search(vectors, 1)[1][:, 0])

    def labelled(example: Example) -> Example:
        topic = example.topic or f"cluster {next(nearest)}"
        return dataclasses.replace(example, topic=topic)

    found = {name: [labelled(e) for e in examples] for name, examples in splits.items()}
    return dataclasses.replace(dataset, **found)
