"""Federated averaging.

Communication-Efficient Learning of Deep Networks from Decentralized Data
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, Algorithm 1
Adaptive Federated Optimization (a server optimizer on the mean update)
    Reddi et al., ICLR 2021, arXiv 2003.00295, Algorithm 1
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.federated.algorithm import (
    Algorithm,
    PyTree,
    State,
    Traffic,
    added,
    by_kind,
    difference,
    one_object,
    stack,
    weighted_sum,
    wide,
)
from fedrag_jax.federated.work import Work, WorkOptions

PLAIN = optax.sgd(1.0)  # x + mean update


@one_object
def fed_avg(
    *,
    server_optimizer: optax.GradientTransformation = PLAIN,
    carry_optimizer: bool = False,
    **work: Unpack[WorkOptions],
) -> Algorithm:
    """x ← x + Σ_k p_k (y_k − x), where y_k is the model of client k after its local steps from x.

    Equal settings return the same object.

    Args:
      server_optimizer: optimizer that receives the pseudo-gradient −Σ_k p_k (y_k − x).
      carry_optimizer: clients keep their optimizer state between rounds instead of starting fresh.
      work: options of `Work`: `local_steps`, `local_epochs`, `sampling`, `dropout`, `stragglers`,
        `weighting`; the paper weights p_k by examples.

    Raises:
      ConfigError: as `Work`.
    """
    return averaging(Work(**work), server_optimizer, carry_optimizer=carry_optimizer)


def averaging(
    work: Work,
    server_optimizer: optax.GradientTransformation = PLAIN,
    correct: Callable | None = None,
    carry_optimizer: bool = False,
) -> Algorithm:
    """Returns an algorithm that averages clients' models, with corrected gradients."""

    def init(trainable, client_init, client_count):
        row = client_init(trainable) if carry_optimizer else ()
        return State(trainable, server_optimizer.init(jax.tree.map(wide, trainable)), row)

    def turn(state, cohort, client):
        x = state.trainable

        def group(members, optimizer):
            x_k = stack(x, len(members.share))
            mine = optimizer if carry_optimizer else client.init(x_k)
            y_k, mine, report = client.update(x_k, mine, members, correct=correct)
            mine = mine if carry_optimizer else ()
            return weighted_sum(members.share, difference(y_k, x_k)), (mine, report)

        rows = state.population or [()] * len(cohort)
        mean, rest = client.total(group, cohort, rows)
        population, report = (list(part) for part in zip(*rest, strict=True))
        x, server = server_step(server_optimizer, x, state.server, mean)
        return State(x, server, population if carry_optimizer else ()), report

    return Algorithm(work, init, (turn,), whole_model, open_server=False)


def server_step(
    optimizer: optax.GradientTransformation, x: PyTree, server: PyTree, mean: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the model and the optimizer state after a step along the mean update."""
    pseudo_gradient = jax.tree.map(jnp.negative, mean)
    parameters = jax.tree.map(wide, x)
    updates, server = optimizer.update(pseudo_gradient, server, parameters)
    moved = optax.apply_updates(parameters, updates)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, x), server


def whole_model(trainable, drawn, answered, round) -> Traffic:
    """Traffic if all trained parameters are sent to each client and back."""
    model = by_kind(trainable)
    return Traffic(added([model] * len(drawn)), added([model] * len(answered)))
