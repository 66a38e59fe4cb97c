"""Every client for itself; with one client, centralised training."""

import functools

import jax

from fedrag_jax.federated.algorithm import Algorithm, State, put, stack, take
from fedrag_jax.federated.fed_avg import positive


@functools.cache
def local_only(local_steps: int = 10, local_epochs: int | None = None) -> Algorithm:
    """K models that start alike and never meet; optimizer states carry on from round to round.

    A round is only a stretch of training between two logs, checkpoints and index refreshes. Equal
    settings, equal object.

    Args:
      local_steps: S steps of every client in a round.
      local_epochs: passes over each client's examples; replaces `local_steps`.

    Raises:
      ConfigError: a count below 1.
    """
    positive("local_only", local_steps=local_steps, local_epochs=local_epochs)

    def init(trainable, client_count, client_init):
        trainable = stack(trainable, client_count)
        return State(trainable, client_init(trainable))

    def apply(state, cohort, client):
        def group(models, members):
            y, optimizer, report = client.update(*take(models, members.clients), members)
            return put(models, members.clients, (y, optimizer)), report

        models = state.trainable, state.optimizer
        models, report = jax.lax.scan(group, models, cohort)
        return State(*models), report

    name = f"local_only(local_steps={local_steps}, local_epochs={local_epochs})"
    return Algorithm(name, local_steps, local_epochs, None, True, init, apply)
