"""Scores of clients: quality on questions like those that each client holds."""

import collections

import numpy as np


def mixture_weights(clients, examples, column: str) -> np.ndarray:
    """Returns float [clients, Q]: the weight of each question for each client; rows sum to 1.

    The weight is proportional to how much of the question's kind (value of `column`) a client holds.
    The row of a client without any question of its kinds is 0.
    """
    kinds = [getattr(e, column) for e in examples]
    asked, weights = collections.Counter(kinds), []
    for client in range(len(clients.clients)):
        held = collections.Counter(getattr(e, column) for e in clients.of(client))
        weight = np.array([held[kind] / asked[kind] for kind in kinds])
        weights.append(weight / (weight.sum() or 1.0))
    return np.stack(weights)


def client_scores(clients, examples, scores, column: str) -> list[float]:
    """Returns each client's score in percent, of its model on questions like its own.

    Clients without a test question of their kinds are left out.

    Args:
      scores: [Q] of the model that all clients use, or of the model of each: a list of one or all.
    """
    weights = mixture_weights(clients, examples, column)
    return [
        100 * float(weight @ np.nan_to_num(scores[client % len(scores)]))
        for client, weight in enumerate(weights)
        if weight.any()
    ]


def own_scores(clients, examples, scores, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(scores, weights)` [Q]: their weighted mean is the clients' mean score on own topics.

    A question's score is the mean over the clients that ask it; its weight is how often it is asked,
    1 on average.

    Args:
      scores: as in `client_scores`; questions without the score (NaN) do not count. A client's model
        needs no scores on other clients' topics.
    """
    scored = ~np.isnan(scores).all(axis=0)
    found, weight = np.full(len(scored), np.nan), np.zeros(len(scored))
    if scored.any():
        some = [e for e, known in zip(examples, scored, strict=True) if known]
        mixtures = mixture_weights(clients, some, column)
        asked = mixtures.any(axis=1)
        each = np.nan_to_num([scores[i % len(scores)][scored] for i in range(len(mixtures))])
        total = mixtures.sum(axis=0)
        found[scored] = (mixtures * each).sum(axis=0) / np.where(total, total, 1.0)
        weight[scored] = len(some) * total / max(asked.sum(), 1)
    return found, weight
