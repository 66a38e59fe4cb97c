"""Placement of arrays: on one device, or over the devices and hosts of a mesh."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import PyTree
from fedrag_jax.federated.engine.cohort import CLIENTS, Cohort
from fedrag_jax.models.network import flatten, unflatten
from fedrag_jax.models.shapes import described, put, shapes_alone


class Placing:
    """Puts arrays where a round wants them and reads back what it leaves.

    Args:
      mesh: a mesh with an axis "clients", or None. If it is only described, shapes replace arrays, for
        a round that is compiled and not run.
      frozen: the task's frozen part, which may already be on a mesh.
      room: maximum number of clients in a round; a single client is not distributed.

    Raises:
      ConfigError: a mesh without that axis, or another than the frozen arrays are on.
    """

    def __init__(self, mesh: Mesh | None, frozen: PyTree, room: int):
        found = mesh_under(frozen)
        if mesh is not None and CLIENTS not in mesh.shape:
            raise ConfigError(f"fit: the mesh needs an axis {CLIENTS!r}, it has {[*mesh.shape]}")
        if mesh is not None:
            # Axes that the compiler manages, however the mesh was made.
            mesh = Mesh(mesh.devices, mesh.axis_names)
            if found is not None and Mesh(found.devices, found.axis_names) != mesh:
                raise ConfigError(
                    f"fit: the frozen arrays are on another mesh, {found}; place them on this one "
                    "with models.sharding.shard"
                )
        # Groups are distributed over this mesh. A single client would be trained on every device again.
        self.clients = mesh if room > 1 else None
        self._all = self.clients or found
        if self._all is None and mesh is not None and described(mesh):
            self._all = Mesh(
                mesh.devices.flat[:1], (CLIENTS,)
            )  # for the device that is used by default
        self.devices = 1 if self.clients is None else mesh.shape[CLIENTS]

    def everywhere(self, tree: PyTree) -> PyTree:
        """Copies a tree to every device; arrays that are already on the mesh stay."""
        if self._all is None:
            return jax.tree.map(lambda x: x if shapes_alone(x) else jax.numpy.asarray(x), tree)
        whole = NamedSharding(self._all, PartitionSpec())

        def placed(x):
            if getattr(getattr(x, "sharding", None), "mesh", None) == self._all:
                return x
            key = jax.dtypes.issubdtype(jax.numpy.result_type(x), jax.dtypes.prng_key)
            if key and not described(self._all):
                return jax.random.wrap_key_data(placed(jax.random.key_data(x)))
            return _put(x, whole)

        return jax.tree.map(placed, tree)

    def beside(self, server: PyTree, frozen: PyTree) -> PyTree:
        """Returns the server's state with the changes of frozen arrays placed like those arrays.

        A change has the path and the shape of what it changes, such as a kernel of a base that is split
        over the mesh (`fed_lora`).
        """
        if self._all is None or not isinstance(server, dict):
            return server
        parts = (part for part in frozen.values() if isinstance(part, dict))
        there = {path: x for part in parts for path, x in flatten(part)}

        def placed(path, x):
            like = there.get(path)
            where = getattr(like, "sharding", None)
            alike = like is not None and like.shape == x.shape
            return _put(x, where) if alike and getattr(where, "mesh", None) == self._all else x

        return unflatten((path, placed(path, x)) for path, x in flatten(server))

    def dealt(self, tree: PyTree) -> PyTree:
        """Distributes groups, the leading axis, over the devices."""
        if self.clients is None:
            return self.everywhere(tree)
        each = NamedSharding(self.clients, PartitionSpec(CLIENTS))
        return jax.tree.map(lambda x: _put(x, each), tree)

    def read(self, tree: PyTree) -> PyTree:
        """Returns the tree as NumPy arrays, wherever its arrays are."""
        if self.clients is None or jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def mesh_under(tree: PyTree) -> Mesh | None:
    """The mesh that arrays are on, or None."""
    places = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    return next((p.mesh for p in places if isinstance(p, NamedSharding)), None)


def _put(x, sharding: NamedSharding):
    if jax.process_count() == 1:
        return put(x, sharding)
    # Every process has the whole, and places what its own devices hold.
    x = np.asarray(x, jax.numpy.result_type(x))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def rows_of(population: PyTree, parts: list[Cohort]) -> PyTree:
    """The rows of a cohort's clients: a list over its parts of [G, g, ...]; () if there are none."""
    if isinstance(population, tuple) and not population:
        return ()

    def rows(part):
        # Any row will do for padding.
        return jax.tree.map(lambda x: x[np.minimum(part.clients, len(x) - 1)], population)

    return [rows(part) for part in parts]


def put_rows(population: PyTree, parts: list[Cohort], rows: PyTree) -> None:
    """Writes them back in place."""
    for part, new in zip(parts, rows, strict=True) if rows else ():

        def put(x, y, clients=part.clients):
            there = clients < len(x)
            x[clients[there]] = y[there]

        jax.tree.map(put, population, new)
