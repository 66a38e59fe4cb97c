"""Coordinate-wise rules: median and trimmed mean.

Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
    Yin, Chen, Ramchandran, Bartlett, ICML 2018, arXiv 1803.01498, definitions 1 and 2
"""

import functools

import jax.numpy as jnp

from fedrag_jax.federated.robust.rule import Rule, ascending, median_of, of_hostile


@functools.cache
def median() -> Rule:
    """The median of each coordinate; all clients have equal weight."""

    def combine(updates, share, there):
        return median_of(updates, there), there

    return Rule("median()", combine)


@functools.cache
def trimmed_mean(byzantine: int = 1) -> Rule:
    """The mean of each coordinate without its `byzantine` smallest and largest values; all clients have
    equal weight. Needs more than 2 · `byzantine` clients."""

    def combine(updates, share, there):
        ordered, count = ascending(updates, there)
        rank = jnp.arange(len(updates))
        inside = (rank >= byzantine) & (rank < count - byzantine)
        kept = jnp.where(inside[:, None], ordered, 0).sum(0)
        return kept / jnp.maximum(inside.sum(), 1).astype(kept.dtype), there

    return of_hostile("trimmed_mean", combine, byzantine, lambda f: 2 * f + 1)
