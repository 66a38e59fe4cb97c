"""Rules for whole updates: bounded norms, and leaving out outliers."""

import functools

import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.robust.rule import Rule, mean_of, median_of


@functools.cache
def norm_bounded(bound: float = 0.0) -> Rule:
    """The weighted mean of updates scaled down to a norm of at most `bound`.

    Can You Really Backdoor Federated Learning?
        Sun, Kairouz, Suresh, McMahan, 2019, arXiv 1911.07963, section 4

    Args:
      bound: maximum norm; 0 uses the median of the round's norms.

    Raises:
      ConfigError: a negative bound.
    """
    if bound < 0:
        raise ConfigError(f"norm_bounded: bound must be at least 0, got {bound}")

    def combine(updates, share, there):
        norms = jnp.linalg.norm(updates, axis=1)
        most = jnp.asarray(bound, norms.dtype) if bound else median_of(norms, there)
        scale = jnp.minimum(1, most / jnp.where(norms > 0, norms, 1))
        return mean_of(updates * scale[:, None], share, there), there

    return Rule(f"norm_bounded(bound={bound})", combine)


@functools.cache
def filtered(limit: float = 3.0) -> Rule:
    """The weighted mean of the updates near the coordinate-wise median.

    An update is left out if its distance from the median is more than `limit` times that of the median
    client. Every rule leaves out updates that are not finite.

    Raises:
      ConfigError: a limit below 1, which could leave out all clients.
    """
    if limit < 1:
        raise ConfigError(f"filtered: limit must be at least 1, got {limit}")

    def combine(updates, share, there):
        far = jnp.linalg.norm(updates - median_of(updates, there)[None], axis=1)
        kept = there & (far <= limit * median_of(far, there))
        return mean_of(updates, share, kept), kept

    return Rule(f"filtered(limit={limit})", combine)
