"""Averaging with control variates against client drift.

SCAFFOLD: Stochastic Controlled Averaging for Federated Learning
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020, arXiv 1910.06378, Algorithm 1,
    control variates by option II
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    Traffic,
    added,
    by_kind,
    difference,
    one_object,
    positive,
    stack,
    weighted_sum,
    wide,
)
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.work import StepOptions, Work


@one_object
def scaffold(
    client_learning_rate: float | Mapping[str, float],
    *,
    server_learning_rate: float = 1.0,
    weighting: str = "uniform",
    **work: Unpack[StepOptions],
) -> Algorithm:
    """y ← y − η_l (g − c_k + c), which moves a client's steps towards the direction of all clients.

        c_k⁺ = c_k − c + (x − y_k) / (S_k η_l)
        x ← x + η_g Σ_k p_k (y_k − x)
        c ← c + Σ_k (c_k⁺ − c_k) / N

    Control variates start at zero; those of clients are stored on the host. The steps are plain SGD,
    because (x − y_k) / (S_k η_l) is a mean of gradients for no other optimizer; do not pass an
    optimizer to `fit`. Client learning rates are inputs of the compiled round: a grid of them compiles
    once.

    Args:
      client_learning_rate: η_l, the same in all rounds; or {name: η_l} for each trained part.
      server_learning_rate: η_g.
      weighting: p_k is "uniform" as in the paper, or by "examples".
      work: as in `fed_avg`.

    Raises:
      ConfigError: a rate that is not positive; as `Work`.
    """
    given, settled = client_learning_rate, Work(weighting=weighting, **work)
    # A mapping comes as a tuple of its items from `one_object`.
    rate = float(given) if isinstance(given, (int, float)) else dict(given)
    by_part = rate if isinstance(rate, dict) else {"": rate}
    for name, value in by_part.items():
        positive("scaffold", **{f"client_learning_rate{name and f'[{name!r}]'}": value})
    positive("scaffold", server_learning_rate=server_learning_rate)

    def init(trainable, client_init, client_count):
        zero = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), trainable)
        server = {"c": zero, "clients": jnp.float32(client_count), "rate": rate}
        return State(trainable, server, zero)

    def traffic(trainable, drawn, answered, round):
        both = by_kind(trainable) | by_kind({"control variate": trainable})
        return Traffic(added([both] * len(drawn)), added([both] * len(answered)))

    if isinstance(rate, dict):
        optimizer = tunable(_sgd_by_part, **rate)
    else:
        optimizer = tunable(optax.sgd, learning_rate=rate)
    turn = _turn_with(server_learning_rate)
    return Algorithm(settled, init, (turn,), traffic, optimizer=optimizer)


@functools.cache  # algorithms that differ in client learning rates share compiled rounds
def _turn_with(server_learning_rate: float) -> Callable:
    def turn(state, cohort, client):
        x, c, rate = state.trainable, state.server["c"], state.server["rate"]
        rate = jax.tree.broadcast(rate, x)

        def correct(gradient, y, x, c_k):
            return jax.tree.map(
                lambda g, c_k, c: (wide(g) - c_k + c).astype(g.dtype), gradient, c_k, c
            )

        def group(members, c_k):
            x_k = stack(x, len(members.share))
            y_k, _, report = client.update(x_k, client.init(x_k), members, c_k, correct)
            moved = difference(y_k, x_k)

            def change(moved, c, rate, steps):
                steps_taken = jnp.maximum(steps, 1).astype(rate.dtype)
                mean = -moved / (steps_taken * rate).astype(moved.dtype)
                return jnp.where(steps > 0, mean - c, 0)

            changes = jax.tree.map(
                lambda d, c, rate: jax.vmap(change, (0, None, None, 0))(d, c, rate, members.steps),
                moved,
                c,
                rate,
            )
            update = weighted_sum(members.share, moved)
            total = jax.tree.map(lambda d: d.sum(0), changes)
            return (update, total), (jax.tree.map(jnp.add, c_k, changes), report)

        (update, changes), rest = client.total(group, cohort, state.population)
        population, report = (list(part) for part in zip(*rest, strict=True))
        x = jax.tree.map(lambda x, u: (x + server_learning_rate * u).astype(x.dtype), x, update)
        clients = state.server["clients"]
        c = jax.tree.map(lambda c, d: (c + d / clients.astype(d.dtype)).astype(c.dtype), c, changes)
        return State(x, state.server | {"c": c}, population), report

    return turn


def _sgd_by_part(**rates) -> optax.GradientTransformation:
    parts: dict[Any, optax.GradientTransformation] = {
        name: optax.sgd(rate) for name, rate in rates.items()
    }
    return optax.partition(parts, lambda tree: {name: name for name in tree})
