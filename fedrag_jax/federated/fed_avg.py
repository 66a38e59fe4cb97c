"""Federated averaging.

Communication-Efficient Learning of Deep Networks from Decentralized Data
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, Algorithm 1
Adaptive Federated Optimization (a server optimizer on the mean update)
    Reddi et al., ICLR 2021, arXiv 2003.00295, Algorithm 1
"""

import functools

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, State, put, stack, take, wide

PLAIN = optax.sgd(1.0)  # x + mean update


@functools.cache
def fed_avg(
    local_steps: int = 10,
    local_epochs: int | None = None,
    clients_per_round: int | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    carry_optimizer: bool = False,
) -> Algorithm:
    """x ← x + Σ_k p_k (y_k − x), with y_k what client k made of x. Equal settings, equal object.

    Args:
      local_steps: S, the same for every client.
      local_epochs: passes over each client's examples; replaces `local_steps`.
      clients_per_round: how many are drawn each round; None for all.
      server_optimizer: fed with the pseudo-gradient −Σ_k p_k (y_k − x); None adds the mean update.
      weighting: p_k ∝ "examples" (n_k, as in the paper) or "uniform".
      carry_optimizer: clients keep their optimizer state between rounds instead of starting fresh.

    Raises:
      ConfigError: a count below 1 or an unknown weighting.
    """
    positive("fed_avg", local_steps=local_steps, local_epochs=local_epochs)
    if weighting not in ("examples", "uniform"):
        raise ConfigError(f'fed_avg: weighting is "examples" or "uniform", got {weighting!r}')
    server = server_optimizer or PLAIN

    def init(trainable, client_count, client_init):
        optimizer = client_init(stack(trainable, client_count)) if carry_optimizer else ()
        return State(trainable, optimizer, server.init(trainable))

    def apply(state, cohort, client):
        x = state.trainable
        weight = cohort.size if weighting == "examples" else cohort.size > 0
        weight = weight.astype(float)  # float64 where that is on
        p = weight / weight.sum()

        def group(carry, inputs):
            mean, optimizer = carry
            members, p = inputs
            x_k = stack(x, len(p))
            mine = take(optimizer, members.clients) if carry_optimizer else client.init(x_k)
            y_k, mine, report = client.update(x_k, mine, members)
            mean = jax.tree.map(
                lambda m, y, x: m + weighted_sum(p, wide(y) - wide(x)), mean, y_k, x_k
            )
            if carry_optimizer:
                optimizer = put(optimizer, members.clients, mine)
            return (mean, optimizer), report

        zero = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), x)
        (mean, optimizer), report = jax.lax.scan(group, (zero, state.optimizer), (cohort, p))
        pseudo_gradient = jax.tree.map(jnp.negative, mean)
        updates, server_state = server.update(pseudo_gradient, state.server, x)
        return State(optax.apply_updates(x, updates), optimizer, server_state), report

    name = (
        f"fed_avg(local_steps={local_steps}, local_epochs={local_epochs}, "
        f"clients_per_round={clients_per_round}, weighting={weighting}, "
        f"carry_optimizer={carry_optimizer})"
    )
    return Algorithm(name, local_steps, local_epochs, clients_per_round, False, init, apply)


def weighted_sum(p: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_k p_k x_k over the leading axis."""
    return jax.vmap(jnp.multiply)(p, x).sum(0).astype(x.dtype)


def positive(algorithm: str, **counts: int | None) -> None:
    """Refuses counts below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{algorithm}: {name} must be at least 1, got {value}")
