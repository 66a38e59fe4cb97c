"""Membership inference: scores, computed from losses, of whether a question was trained on.

A higher score says "member".

`by_loss`: the negative loss (Yeom et al. 2018, arXiv 1709.01604).
`calibrated`: the difference from the loss of a model that has not seen the question, such as the model
    before training (Watson et al. 2022, 2111.08440).
`likelihood_ratio`: offline LiRA, the difference from the confidence of shadow models that were trained
    in the same way without the question (Carlini et al. 2022, 2112.03570, section VI-A).
"""

import numpy as np

from fedrag_jax.errors import DataError


def by_loss(nll) -> np.ndarray:
    """Returns -loss [N]."""
    return -np.asarray(nll, np.float64)


def calibrated(nll, reference) -> np.ndarray:
    """Returns the loss of the reference minus the loss of the model, [N]."""
    return np.asarray(reference, np.float64) - np.asarray(nll, np.float64)


def confidence(nll) -> np.ndarray:
    """Returns φ = log(p / (1 - p)) with p = exp(-loss); over models it is nearly normal."""
    nll = np.asarray(nll, np.float64)
    return -nll - np.log(-np.expm1(-np.maximum(nll, 1e-12)))


def likelihood_ratio(nll, shadows, trained_on) -> np.ndarray:
    """Returns z = (φ - μ_out) / σ_out [N]; the paper's offline score Λ = Φ(z) increases with it.

    μ_out is a mean for each question, over the shadow models trained without it. σ_out is one value for
    all questions, as the paper advises for few shadow models.

    Args:
      nll: losses [N] of the attacked model.
      shadows: losses [S, N] of the shadow models.
      trained_on: bool [S, N], whether the shadow model was trained on the question.

    Raises:
      DataError: all shadow models were trained on a question, or no question was left out by two.
    """
    shadows, out = confidence(shadows), ~np.asarray(trained_on, bool)
    count = out.sum(0)
    if not count.all():
        raise DataError(
            f"question {int(np.argmin(count))} is in the training data of all {len(shadows)} shadow "
            "models, but at least one must be trained without it; draw them in pairs of complements"
        )
    if count.max() < 2:
        raise DataError(
            "no question was left out by two shadow models, which their spread needs; train more models"
        )
    mean = np.where(out, shadows, 0).sum(0) / count
    squares = np.where(out, (shadows - mean) ** 2, 0).sum()
    deviation = np.sqrt(squares / (count - 1).sum())
    return (confidence(nll) - mean) / max(deviation, 1e-12)


def halves(count: int, shadows: int, seed: int) -> np.ndarray:
    """Returns bool [shadows, count]: random halves of `count` items, each followed by its complement.

    Every item is therefore in the training data of half of the shadow models.

    Raises:
      DataError: an odd number of shadow models, or fewer than two items.
    """
    if shadows % 2 or count < 2:
        raise DataError(
            f"halves needs an even number of shadows and at least two items, got {shadows}, {count}"
        )
    rng = np.random.default_rng(seed)
    found = np.zeros((shadows, count), bool)
    for pair in range(shadows // 2):
        found[2 * pair, rng.permutation(count)[: count // 2]] = True
        found[2 * pair + 1] = ~found[2 * pair]
    return found
