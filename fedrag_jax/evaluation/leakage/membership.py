"""Whether a question was trained on: scores of membership from losses. Higher says "member".

`by_loss`: the loss itself (Yeom et al. 2018, arXiv 1709.01604).
`calibrated`: how far it fell below that of a model that has not seen the question, such as the one that
    training began with (Watson et al. 2022, 2111.08440).
`likelihood_ratio`: LiRA, offline: how far the confidence is from that of shadow models which were
    trained alike and without the question (Carlini et al. 2022, 2112.03570, section VI-A).
"""

import numpy as np

from fedrag_jax.errors import DataError


def by_loss(nll) -> np.ndarray:
    """-loss [N]."""
    return -np.asarray(nll, np.float64)


def calibrated(nll, reference) -> np.ndarray:
    """loss of the reference - loss of the model, [N]."""
    return np.asarray(reference, np.float64) - np.asarray(nll, np.float64)


def confidence(nll) -> np.ndarray:
    """φ = log(p / (1 - p)) with p = exp(-loss), which is near to normal over models."""
    nll = np.asarray(nll, np.float64)
    return -nll - np.log(-np.expm1(-np.maximum(nll, 1e-12)))


def likelihood_ratio(nll, shadows, trained_on) -> np.ndarray:
    """z = (φ - μ_out) / σ_out [N]; Λ = Φ(z) of the paper's offline attack, which grows with it.

    μ_out is the question's own, over the shadow models without it; σ_out is one for all questions, as
    the paper advises where shadow models are few.

    Args:
      nll: losses [N] of the model that is attacked.
      shadows: losses [S, N] of the shadow models.
      trained_on: bool [S, N], whether the shadow was trained on the question.

    Raises:
      DataError: a question that all shadows were trained on; no question that two were not.
    """
    shadows, out = confidence(shadows), ~np.asarray(trained_on, bool)
    count = out.sum(0)
    if not count.all():
        raise DataError(
            f"question {int(np.argmin(count))} was trained on by all {len(shadows)} shadow models: "
            "each needs one without it; draw them in pairs of complements"
        )
    if count.max() < 2:
        raise DataError("the spread over shadow models needs two without a question; train more")
    mean = np.where(out, shadows, 0).sum(0) / count
    squares = np.where(out, (shadows - mean) ** 2, 0).sum()
    deviation = np.sqrt(squares / (count - 1).sum())
    return (confidence(nll) - mean) / max(deviation, 1e-12)


def halves(count: int, shadows: int, seed: int) -> np.ndarray:
    """bool [shadows, count]: halves of things at random, each beside its complement, so that all things
    are in half of the shadows.

    Raises:
      DataError: an odd number of shadows, or fewer than two things.
    """
    if shadows % 2 or count < 2:
        raise DataError(
            f"halves need an even number of shadows and two things, got {shadows}, {count}"
        )
    rng = np.random.default_rng(seed)
    found = np.zeros((shadows, count), bool)
    for pair in range(shadows // 2):
        found[2 * pair, rng.permutation(count)[: count // 2]] = True
        found[2 * pair + 1] = ~found[2 * pair]
    return found
