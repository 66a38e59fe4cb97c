"""The start of training: the clients' optimizer of each round, and the state before the first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.callbacks import Callback, FitState
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.models.shapes import shapes_alone
from fedrag_jax.objectives.task import Task

ADAMW = tunable(optax.adamw, learning_rate=1e-3)


def schedule(algorithm: Algorithm, optimizer) -> Callable[[int], optax.GradientTransformation]:
    """The clients' optimizer of a round."""
    if algorithm.optimizer is not None:
        if optimizer is not None:
            raise ConfigError(
                f"fit: {algorithm.name} has its own client optimizer; leave `optimizer` out"
            )
        optimizer = algorithm.optimizer
    optimizer = ADAMW if optimizer is None else optimizer
    fixed = isinstance(optimizer, optax.GradientTransformation)
    return (lambda _: optimizer) if fixed else optimizer


def started(
    now: FitState, algorithm: Algorithm, callbacks: list[Callback], rounds: int
) -> FitState:
    """Returns the state to start from; the first callback may restore an earlier one."""
    _require_whole_model(algorithm, callbacks)
    for i, callback in enumerate(callbacks):
        before, now = now.round, callback.start(now)
        if i > 0 and now.round != before:
            raise ConfigError(
                f"fit: {type(callback).__name__} restored round {now.round} after "
                f"{type(callbacks[0]).__name__} had started at round {before}; put "
                f"{type(callback).__name__} first in callbacks"
            )
    if now.round > rounds:
        raise ConfigError(
            f"fit: the checkpoint is at round {now.round} but rounds={rounds}; raise rounds"
        )
    return now


def _require_whole_model(algorithm: Algorithm, callbacks: list[Callback]) -> None:
    if algorithm.model is None and not algorithm.changes_base:
        return
    elsewhere = "changes the base" if algorithm.changes_base else "leaves models with its clients"
    for callback in callbacks:
        if callback.needs_whole_model:
            raise ConfigError(
                f"fit: {algorithm.name} {elsewhere}, but {type(callback).__name__} saves only the "
                "trained part of one model; leave this callback out (in a comparison, take a regime "
                "without _converged), or train with another algorithm"
            )


def initial_state(task: Task, algorithm: Algorithm, optimizer, client_count: int) -> State:
    """Returns the state before the first round, with the row of one client as `population`.

    Arrays are copied, because rounds reuse the memory of the state, and have fixed types, so that all
    rounds share one program. For a task of shapes, the state has shapes, and the row is zeros.
    """

    def initial(trainable):
        trainable = jax.tree.map(jnp.asarray, trainable)
        state = algorithm.init(trainable, optimizer.init, client_count)
        return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), state)

    if not shapes_alone(task.trainable):
        return initial(task.trainable)
    state = jax.eval_shape(initial, task.trainable)
    row = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.population)
    return state._replace(population=row)


def all_rows(row: PyTree, client_count: int) -> PyTree:
    """A population of which all clients have the same row: NumPy arrays [N, ...]."""
    return jax.tree.map(lambda x: np.tile(np.asarray(x), (client_count, *[1] * x.ndim)), row)
