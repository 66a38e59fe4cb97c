"""Converts vectors so that their inner product is the similarity of their encoder.

| similarity | inner product of |
|---|---|
| cosine | normalised vectors |
| dot | unchanged vectors |
| euclidean | (2q, -|q|², -1) and (d, 1, |d|²), which is -|q - d|² and ranks like the distance |

An index that searches by inner products therefore supports all three similarities.
"""

from fedrag_jax.models.pooling import Use


def question_side(vectors, config: Use, head=None):
    """Converts question vectors [..., D] (NumPy or JAX), after a head [D, E] if there is one.

    Returns:
      [..., E], or [..., E + 2] for euclidean.
    """
    vectors = vectors if head is None else vectors @ head
    if config.similarity != "euclidean":
        return unit(vectors) if config.similarity == "cosine" else vectors
    square, one = _square_and_one(vectors)
    return vectors.__array_namespace__().concat([2 * vectors, -square, -one], axis=-1)


def passage_side(vectors, config: Use, head=None):
    """Converts passage vectors, as `question_side`; vectors of length 1 are returned unchanged."""
    if config.similarity == "cosine" and config.normalize and head is None:
        return vectors
    if config.similarity != "euclidean":
        return question_side(vectors, config, head)
    vectors = vectors if head is None else vectors @ head
    square, one = _square_and_one(vectors)
    return vectors.__array_namespace__().concat([vectors, one, square], axis=-1)


def unit(vectors):
    """Normalises vectors to length 1."""
    return vectors / ((vectors**2).sum(-1, keepdims=True) ** 0.5).clip(1e-9)


def _square_and_one(vectors):
    square = (vectors**2).sum(-1, keepdims=True)
    return square, vectors.__array_namespace__().ones_like(square)
