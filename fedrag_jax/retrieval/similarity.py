"""Vectors whose inner product is the similarity that their encoder was trained for.

| similarity | inner product |
|---|---|
| cosine | of vectors of length 1 |
| dot | of vectors as they are |
| euclidean | -|q - d|², which ranks as the distance does: of (2q, -|q|², -1) and (d, 1, |d|²) |

So whatever searches by inner products searches by any of them.
"""

from fedrag_jax.models.pooling import Use


def question_side(vectors, config: Use, head=None):
    """Vectors [..., D] of questions, of NumPy or JAX, behind a head [D, E] if there is one.

    Returns:
      [..., E], or [..., E + 2] for euclidean.
    """
    vectors = vectors if head is None else vectors @ head
    if config.similarity != "euclidean":
        return unit(vectors) if config.similarity == "cosine" else vectors
    square, one = _square_and_one(vectors)
    return vectors.__array_namespace__().concat([2 * vectors, -square, -one], axis=-1)


def passage_side(vectors, config: Use, head=None):
    """Those of passages, as `question_side`; themselves where they have length 1 already."""
    if config.similarity == "cosine" and config.normalize and head is None:
        return vectors
    if config.similarity != "euclidean":
        return question_side(vectors, config, head)
    vectors = vectors if head is None else vectors @ head
    square, one = _square_and_one(vectors)
    return vectors.__array_namespace__().concat([vectors, one, square], axis=-1)


def unit(vectors):
    """The same at length 1."""
    return vectors / ((vectors**2).sum(-1, keepdims=True) ** 0.5).clip(1e-9)


def _square_and_one(vectors):
    square = (vectors**2).sum(-1, keepdims=True)
    return square, vectors.__array_namespace__().ones_like(square)
