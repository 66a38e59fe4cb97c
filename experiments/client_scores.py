"""How well clients are served: scores of questions such as each of them holds."""

import collections

import numpy as np


def mixture_weights(clients, examples, column: str) -> np.ndarray:
    """float [clients, Q]: how much each question counts for a client, rows adding up to 1.

    A question counts in proportion to how much of its kind (the value of `column`) the client holds.
    Rows of clients of whose kinds no question is are 0.
    """
    kinds = [getattr(e, column) for e in examples]
    asked, weights = collections.Counter(kinds), []
    for client in range(len(clients.clients)):
        held = collections.Counter(getattr(e, column) for e in clients.of(client))
        weight = np.array([held[kind] / asked[kind] for kind in kinds])
        weights.append(weight / (weight.sum() or 1.0))
    return np.stack(weights)


def client_scores(clients, examples, scores, column: str) -> list[float]:
    """For each client the score of its model, in percent, on questions such as it holds.

    Clients of whose kinds no test question is are left out.

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
    """`(scores, weights)` [Q], whose weighted mean is the mean over clients of a score on questions
    such as each holds: the mean over those who ask a question, and how much they do, 1 on average.

    Args:
      scores: as of `client_scores`; questions without the score (NaN) count for nobody. A client
        need not be asked about topics that are not its own.
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
