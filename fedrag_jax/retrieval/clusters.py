"""Topics for questions that have none: clusters of their embeddings."""

import dataclasses

import faiss
import numpy as np

from fedrag_jax.data.examples import Dataset, Example
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.retrieval.retriever import Retriever


def kmeans_labels(
    vectors: np.ndarray, clusters: int = 10, centres_of: np.ndarray | None = None
) -> np.ndarray:
    """Returns the k-means cluster of each vector, int [N], as labels for splitting examples.

        labels = kmeans_labels(retriever.vectors, clusters=20)
        partition(world.passages, dirichlet(alpha=0.1, clients=8, column=labels))

    Args:
      vectors: [N, D] vectors of questions or passages.
      clusters: number of clusters; one per vector if there are fewer vectors.
      centres_of: [M, D] vectors from which the centres are computed; default: all `vectors`.

    Raises:
      ConfigError: fewer than one cluster.
      DataError: vectors that are not a finite matrix.
    """
    if clusters < 1:
        raise ConfigError(f"kmeans_labels: clusters must be at least 1, got {clusters}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    known = vectors if centres_of is None else np.ascontiguousarray(centres_of, np.float32)
    if not known.size or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError(
            f"kmeans_labels: vectors must be finite [N, D], got shape {vectors.shape} with "
            f"{(~np.isfinite(vectors)).sum()} numbers that are not; embed non-empty texts"
        )
    # Fewer than 39 points a cluster make FAISS warn, and they are fine here.
    count = min(clusters, len(known))
    kmeans = faiss.Kmeans(known.shape[1], count, niter=25, seed=0, min_points_per_centroid=1)
    kmeans.train(known)
    return kmeans.index.search(vectors, 1)[1][:, 0]


def with_topics(dataset: Dataset, retriever: Retriever, clusters: int = 10) -> Dataset:
    """Returns the dataset with a topic for every question: its own, or a k-means cluster.

    Clusters are computed from the training questions without a topic, with the untuned query encoder.
    Other questions without a topic join the nearest cluster.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    if all(e.topic for e in dataset.train):
        return dataset
    bare = [e for examples in splits.values() for e in examples if not e.topic]
    vectors = retriever.embed_questions([e.question for e in bare])
    known = vectors[: sum(not e.topic for e in dataset.train)]
    nearest = iter(kmeans_labels(vectors, clusters, centres_of=known))

    def labelled(example: Example) -> Example:
        topic = example.topic or f"cluster {next(nearest)}"
        return dataclasses.replace(example, topic=topic)

    found = {name: [labelled(e) for e in examples] for name, examples in splits.items()}
    return dataclasses.replace(dataset, **found)
