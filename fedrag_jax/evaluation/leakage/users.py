"""Whose questions they are: which clients took part in training, and which of them holds a question."""

import numpy as np

from fedrag_jax.errors import DataError


def took_part(scores, users) -> tuple[np.ndarray, np.ndarray]:
    """`(users [U], scores [U])`: user inference by some of each user's questions, which need not be
    those that were trained on (Kandpal et al. 2023, arXiv 2310.09266, the mean of log p_θ / p_ref).

    Args:
      scores: float [N] of questions, of `membership.calibrated`.
      users: int [N].
    """
    names, place = np.unique(np.asarray(users), return_inverse=True)
    return names, np.bincount(place, np.asarray(scores, np.float64)) / np.bincount(place)


def source(losses) -> np.ndarray:
    """int [N]: of the clients whose models an honest but curious server sees, the one with the least
    loss on a question is taken for its owner (Hu et al. 2021, arXiv 2109.05659).

    Args:
      losses: [K, N] of the clients' models.

    Raises:
      DataError: fewer than two clients.
    """
    losses = np.asarray(losses)
    if losses.ndim != 2 or len(losses) < 2:
        raise DataError(
            f"owners are told among two clients at least, losses [K, N]; got {losses.shape}"
        )
    return losses.argmin(0)
