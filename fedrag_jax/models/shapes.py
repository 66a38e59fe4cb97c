"""Shapes instead of arrays, for models that are not loaded and devices that are not present.

Programs are compiled for them but not run. The models come from `hub.describe`, the devices from
`jax.experimental.topologies`.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding


def shapes_alone(tree) -> bool:
    """Returns whether parameters are `jax.ShapeDtypeStruct`s of a model that is not loaded."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def described(mesh: Mesh) -> bool:
    """Returns whether the devices of a mesh are only described, so that nothing can be put on them."""
    return all(device.local_hardware_id is None for device in mesh.devices.flat)


def put(x, sharding: NamedSharding):
    """Puts an array on the devices of a sharding; for shapes or described devices, returns the placed
    shape."""
    if not isinstance(x, jax.ShapeDtypeStruct) and not described(sharding.mesh):
        return jax.device_put(x, sharding)
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)


def ask(program: Callable, network, params, *inputs, **options):
    """Calls a compiled function with a network; returns zeros of the right shape if parameters are
    shapes."""
    if not shapes_alone(params):
        return program(network, params, *inputs, **options)
    found = jax.eval_shape(lambda *arrays: program(network, *arrays, **options), params, *inputs)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)
