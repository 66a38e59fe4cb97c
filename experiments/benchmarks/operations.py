"""Floating-point operations of a traced program: its products, loops counted as often as they run."""

import math

import jax


def operations(jaxpr, steps: int = 1) -> float:
    """Returns the operations of all devices; multiplication and addition count 2. Products only.

    Args:
      jaxpr: open or closed.
      steps: how often loops run whose number of turns is not a constant.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inner = equation.primitive.name, list(_inside(equation.params))
        if name == "dot_general":
            total += _product(equation)
        elif name == "scan":
            total += equation.params["length"] * sum(operations(j, steps) for j in inner)
        elif name == "while":
            total += steps * operations(equation.params["body_jaxpr"], steps)
        elif name == "shard_map":  # each device does its part
            told = equation.params  # whose names differ between versions of JAX
            axes = told.get("newly_manual_axes", told.get("manual_axes"))
            devices = math.prod(told["mesh"].shape[axis] for axis in axes)
            total += devices * sum(operations(j, steps) for j in inner)
        elif name == "pallas_call":  # with the blocks that a kernel's mask lets it skip
            grid = math.prod(equation.params["grid_mapping"].grid)
            total += grid * sum(operations(j, steps) for j in inner)
        elif name == "cond":
            total += max(operations(j, steps) for j in inner)
        else:
            total += sum(operations(j, steps) for j in inner)
    return total


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    (result,), left = equation.outvars, equation.invars[0].aval.shape
    return 2.0 * math.prod(result.aval.shape) * math.prod(left[i] for i in contracted)


def _inside(params):
    for value in jax.tree.leaves(
        params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value
