"""Optimizers whose numbers are inputs of the compiled round."""

from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import Partial

INPUT = "an input of the program"


def tunable(make, **hyperparameters) -> optax.GradientTransformation:
    """`make(**hyperparameters)` whose floats are not compiled in: a grid of them compiles once.

    Example: `tunable(optax.adamw, learning_rate=3e-4, eps=1e-4)`.
    """
    return optax.GradientTransformation(
        Partial(_init, make, **hyperparameters), Partial(_update, make, **hyperparameters)
    )


def split(optimizer: optax.GradientTransformation) -> tuple[tuple, list, Any]:
    """`(fixed, numbers, structure)`: hashable parts, floats and arrays, and what joins them.

    An optimizer that optax made has only fixed parts: its two functions, known by identity.
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
