"""Shapes in place of arrays: of models described and not loaded, for devices that are not here.

Programs are compiled for them and not run. `hub.describe` gives the one, `jax.experimental.topologies`
the other.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding


def shapes_alone(tree) -> bool:
    """Whether parameters are `jax.ShapeDtypeStruct`s, of a model that was described and not loaded."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def described(mesh: Mesh) -> bool:
    """Whether its devices are known by their description alone, so that nothing can be put on them."""
    return all(device.local_hardware_id is None for device in mesh.devices.flat)


def put(x, sharding: NamedSharding):
    """An array where a sharding says; its shape placed there if that is all there is, or if the devices
    are only described."""
    if not isinstance(x, jax.ShapeDtypeStruct) and not described(sharding.mesh):
        return jax.device_put(x, sharding)
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding)


def ask(program: Callable, network, params, *inputs, **options):
    """What a compiled function makes of a network; zeros of that shape where parameters are shapes."""
    if not shapes_alone(params):
        return program(network, params, *inputs, **options)
    found = jax.eval_shape(lambda *arrays: program(network, *arrays, **options), params, *inputs)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)
