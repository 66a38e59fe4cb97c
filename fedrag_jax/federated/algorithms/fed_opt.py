"""Adaptive optimizers on the server: FedAdagrad, FedAdam, FedYogi.

Adaptive Federated Optimization
    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, ICLR 2021, arXiv 2003.00295,
    Algorithm 2

    m ← β₁m + (1 − β₁)Δ
    v ← v + Δ²                          Adagrad
    v ← β₂v + (1 − β₂)Δ²                Adam
    v ← v − (1 − β₂)Δ² sign(v − Δ²)     Yogi
    x ← x + η m / (√v + τ)

There is no bias correction, τ stands outside the root, m₀ = 0 and v₀ = τ².
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.federated.algorithm import Algorithm, one_object, positive, require_momentum
from fedrag_jax.federated.algorithms.fed_avg import averaging
from fedrag_jax.federated.work import Work, WorkOptions

SECOND_MOMENTS = {
    "adagrad": lambda v, square, b2: v + square,
    "adam": lambda v, square, b2: b2 * v + (1 - b2) * square,
    "yogi": lambda v, square, b2: v - (1 - b2) * square * jnp.sign(v - square),
}


class FedOptState(NamedTuple):
    """First and second moment of the pseudo-gradient, like the parameters."""

    m: optax.Updates
    v: optax.Updates


def scale_by_fed_opt(kind: str, b1: float, b2: float, tau: float) -> optax.GradientTransformation:
    """Returns the optax transformation from g to m / (√v + τ); kinds are those of `SECOND_MOMENTS`."""
    second_moment = SECOND_MOMENTS[kind]

    def init(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return FedOptState(zero, jax.tree.map(lambda x: jnp.full_like(x, tau**2), params))

    def update(updates, state, params=None):
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: second_moment(v, g**2, b2), state.v, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v), FedOptState(m, v)

    return optax.GradientTransformation(init, update)


@one_object
def fed_adagrad(
    *,
    learning_rate: float = 0.01,
    b1: float = 0.0,
    tau: float = 1e-3,
    **work: Unpack[WorkOptions],
) -> Algorithm:
    """Averaging with Adagrad on the server, by default without momentum.

    Args:
      learning_rate: η, the server's learning rate.
      b1: β₁.
      tau: τ; a larger value makes the steps less adaptive.
      work: as in `fed_avg`.
    """
    return _fed_opt("adagrad", learning_rate, b1, 1.0, tau, work)


@one_object
def fed_adam(
    *,
    learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    **work: Unpack[WorkOptions],
) -> Algorithm:
    """Averaging with Adam on the server; arguments as in `fed_adagrad`, and `b2`, β₂."""
    return _fed_opt("adam", learning_rate, b1, b2, tau, work)


@one_object
def fed_yogi(
    *,
    learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    **work: Unpack[WorkOptions],
) -> Algorithm:
    """Averaging with Yogi on the server; arguments as in `fed_adam`."""
    return _fed_opt("yogi", learning_rate, b1, b2, tau, work)


def _fed_opt(kind, learning_rate, b1, b2, tau, work) -> Algorithm:
    positive(f"fed_{kind}", learning_rate=learning_rate, tau=tau)
    require_momentum(f"fed_{kind}", b1=b1, **({} if kind == "adagrad" else {"b2": b2}))
    server = optax.chain(
        scale_by_fed_opt(kind, b1, b2, tau), optax.scale_by_learning_rate(learning_rate)
    )
    return averaging(Work(**work), server)
