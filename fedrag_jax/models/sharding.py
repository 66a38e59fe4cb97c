"""The frozen base over several devices (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053).

Queries, keys, values, gates and up-projections are split by output, so that each hidden unit (and each
head, if the devices divide them) is on one device. The following layers are split by input, and one
all-reduce sums the parts. Embedding tables are split by token. The compiler places the rest.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import flatten, unflatten
from fedrag_jax.models.shapes import put

# Which axis of the last two is cut: rows [in, ...] or columns [..., out].
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_ROWS = ("o_proj", "down_proj", "embed")


def shard(params: dict, mesh: Mesh, axis: str = "model") -> dict:
    """Splits the parameters of a base, quantised or not, over the devices of a mesh axis.

    On CPUs networks run on them without changes. On accelerators they need plain attention
    (`network.attending("plain")`), because the compiler cannot partition a kernel. Adapters, batches
    and clients stay the same. For shapes or described devices, it returns placed shapes.

    Raises:
      ConfigError: an unknown axis, or sizes that it does not divide (all reported at once).
    """
    if axis not in mesh.shape:
        raise ConfigError(f"the mesh has no axis {axis!r}, but {list(mesh.shape)}")
    mesh = Mesh(
        mesh.devices, mesh.axis_names
    )  # axes that the compiler manages, however it was made
    count, odd = mesh.shape[axis], []

    def placed(path, leaf):
        name = path[-2]
        columns = name in _COLUMNS and path[-1] in ("kernel", "bias")
        rows = name in _ROWS and path[-1] in ("kernel", "embedding")
        if not columns and not rows:
            return jax.tree.map(lambda x: put(x, NamedSharding(mesh, PartitionSpec())), leaf)

        def cut(array):
            at = len(array.shape) - (1 if columns else 2)
            if array.shape[at] % count:
                odd.append(f"{'.'.join(path)} {array.shape}")
                return array
            spec = [None] * len(array.shape)
            spec[at] = axis
            return put(array, NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(cut, leaf)

    placed_leaves = [(path, placed(path, leaf)) for path, leaf in flatten(params)]
    if odd:
        raise ConfigError(f"{count} devices do not divide {odd}; use fewer, or another model")
    return unflatten(placed_leaves)
