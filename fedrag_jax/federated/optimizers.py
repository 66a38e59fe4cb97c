"""Optimizers whose hyperparameters are inputs of the compiled round."""

from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import Partial

INPUT = "an input of the program"


def tunable(make, **hyperparameters) -> optax.GradientTransformation:
    """Returns `make(**hyperparameters)` with floats as program inputs, so that a grid compiles once.

    Example: `tunable(optax.adamw, learning_rate=3e-4, eps=1e-4)`.
    """
    return optax.GradientTransformation(
        Partial(_init, make, **hyperparameters), Partial(_update, make, **hyperparameters)
    )


def split(optimizer: optax.GradientTransformation) -> tuple[tuple, list, Any]:
    """Splits an optimizer into `(fixed, numbers, structure)`: hashable parts, floats and arrays, and
    the structure that joins them.

    An optax optimizer has only fixed parts: its two functions, compared by identity.
    """
    leaves, structure = jax.tree.flatten(optimizer)
    is_number = [isinstance(x, (float, np.ndarray, np.generic, jax.Array)) for x in leaves]
    fixed = tuple(INPUT if n else x for x, n in zip(leaves, is_number, strict=True))
    return fixed, [x for x, n in zip(leaves, is_number, strict=True) if n], structure


def join(fixed: tuple, numbers: list, structure: Any) -> optax.GradientTransformation:
    """Undoes `split`."""
    numbers = iter(numbers)
    return jax.tree.unflatten(structure, [next(numbers) if x is INPUT else x for x in fixed])


def _init(make, params, **hyperparameters):
    return make(**hyperparameters).init(params)


def _update(make, updates, state, params=None, **hyperparameters):
    return make(**hyperparameters).update(updates, state, params)
