"""Attacks on clients: which clients took part in training, and which client holds a question."""

import numpy as np

from fedrag_jax.errors import DataError


def took_part(scores, users) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(users [U], scores [U])`: user inference from some questions of each user.

    The score is the mean of log p_θ / p_ref (Kandpal et al. 2023, arXiv 2310.09266). The questions need
    not be those that were trained on.

    Args:
      scores: float [N], scores of questions from `membership.calibrated`.
      users: int [N], the user of each question.
    """
    names, place = np.unique(np.asarray(users), return_inverse=True)
    return names, np.bincount(place, np.asarray(scores, np.float64)) / np.bincount(place)


def source(losses) -> np.ndarray:
    """Returns int [N]: for each question, the client whose model has the lowest loss on it.

    An honest but curious server, which sees the clients' models, takes this client for the owner of the
    question (Hu et al. 2021, arXiv 2109.05659).

    Args:
      losses: [K, N], losses of the clients' models.

    Raises:
      DataError: fewer than two clients.
    """
    losses = np.asarray(losses)
    if losses.ndim != 2 or len(losses) < 2:
        raise DataError(f"losses must be [K, N] of at least two clients, got {losses.shape}")
    return losses.argmin(0)
