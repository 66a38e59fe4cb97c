"""Exact nearest-neighbour search over a corpus on devices: GPUs, TPUs, or a CPU through XLA.

The search is a matrix product and `jax.lax.top_k` for each block of the corpus. `jax.lax.approx_max_k`
would be no faster, because it is exact except on TPUs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedrag_jax.retrieval.index.vector_index import VectorIndex

# Scores held at once, whatever the corpus: 256 queries by 16,384 passages are 16 MiB.
BLOCK = 16384
_QUERIES = 256
TILE = 128  # blocks are multiples of this: products of a ragged edge may be rounded otherwise


class DeviceIndex(VectorIndex):
    """An index with blocks of vectors of equal size, evenly distributed over devices of this process.

    Args:
      devices: the devices; None for all accelerators, or on a CPU for the default device, because
        virtual CPU devices share one memory.
    """

    def __init__(self, vectors: np.ndarray, devices: Sequence[jax.Device] | None = None):
        super().__init__(vectors)
        if devices is None:
            on_cpu = jax.default_backend() == "cpu"
            devices = jax.local_devices()[: 1 if on_cpu else None]
        self._devices, size = devices, len(self)
        each = -(-size // (BLOCK * len(devices)))  # blocks of a device
        blocks = each * len(devices)
        block = -(-size // (blocks * TILE)) * TILE
        mesh = jax.sharding.Mesh(np.array(devices), ("passages",))
        self._held = NamedSharding(mesh, PartitionSpec("passages"))

        def share(index: tuple[slice, ...]) -> np.ndarray:
            """Returns the padded blocks of one device, without a second copy of all of them."""
            start, stop, _ = index[0].indices(blocks)
            some = vectors[start * block : stop * block]
            padded = np.zeros(((stop - start) * block, self.dimension), np.float32)
            padded[: len(some)] = some
            return padded.reshape(-1, block, self.dimension)

        shape = blocks, block, self.dimension
        self._blocks = jax.make_array_from_callback(shape, self._held, share)

    def _settings(self) -> dict[str, Any]:
        return {"devices": self._devices}

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D], a read-only copy on the host; change vectors with `replace`."""
        return np.asarray(self._blocks).reshape(-1, self.dimension)[: len(self)]

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self._devices) == 1:
            return search_blocks(self._blocks, len(self), queries, k)
        return search_blocks(self._blocks, len(self), queries, k, self._held.mesh)

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._blocks = put_rows(self._blocks, rows, vectors)


def search_blocks(
    blocks: jax.Array, count: int, queries: np.ndarray, k: int, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Searches the first `count` rows of `blocks` [n, b, D]; returns rows int32 and scores float32 [Q,
    k].

    Equal scores are ordered by row.

    Args:
      mesh: mesh of the devices that hold the blocks, with an axis "passages"; None for one device.
    """
    rows, scores = [], []
    for start in range(0, len(queries), _QUERIES):
        some = queries[start : start + _QUERIES]
        # Widths are powers of two, so that few programs are compiled.
        padded = np.zeros((1 << (len(some) - 1).bit_length(), queries.shape[1]), np.float32)
        padded[: len(some)] = some
        if mesh is None:
            found = _nearest(blocks, count, padded, k)
        else:
            found = _nearest_of_all(blocks, count, padded, k, mesh)
        rows.append(found[0][: len(some)])
        scores.append(found[1][: len(some)])
    return np.concatenate(jax.device_get(rows)), np.concatenate(jax.device_get(scores))


@partial(jax.jit, static_argnames=("k", "mesh"))
def _nearest_of_all(blocks: jax.Array, count, queries: jax.Array, k: int, mesh: Mesh):
    """As `_nearest`, over the blocks of all devices; the best results of each device are merged."""

    def of_one(blocks, count, queries):
        first = len(blocks) * jax.lax.axis_index("passages")
        return [x[None] for x in _nearest(blocks, count, queries, k, first)]

    held, everywhere = PartitionSpec("passages"), PartitionSpec()
    rows, scores = jax.shard_map(
        of_one,
        mesh=mesh,
        in_specs=(held, everywhere, everywhere),
        out_specs=[held, held],
        check_vma=False,
    )(blocks, count, queries)
    # Devices hold ascending rows, so that the first of equals has the lowest row here, too.
    rows, scores = (x.swapaxes(0, 1).reshape(len(queries), -1) for x in (rows, scores))
    scores, places = jax.lax.top_k(scores, k)
    return jnp.take_along_axis(rows, places, axis=1), scores


@partial(jax.jit, static_argnames="k")
def _nearest(blocks: jax.Array, count, queries: jax.Array, k: int, first=0):
    """Returns rows and scores [Q, k] of `queries` [Q, D] in the first `count` rows of `blocks` [n, b,
    D].

    top_k keeps the first of equal scores. Earlier results come first and have lower rows, so equal
    scores are ordered by row.

    Args:
      first: the number of the first block.
    """
    size = blocks.shape[1]

    def step(best, numbered):
        (rows, scores), (number, block) = best, numbered
        # The default precision would round to TF32 on GPUs and to bfloat16 on TPUs.
        new = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
        new = jnp.where(number * size + jnp.arange(size) < count, new, -jnp.inf)
        scores, places = jax.lax.top_k(jnp.concatenate([scores, new], axis=1), k)
        kept = jnp.take_along_axis(rows, jnp.minimum(places, k - 1), axis=1)
        return (jnp.where(places < k, kept, number * size + places - k), scores), None

    shape = len(queries), k
    none = jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, queries.dtype)
    numbers = first + jnp.arange(len(blocks), dtype=jnp.int32)
    return jax.lax.scan(step, none, (numbers, blocks))[0]


@partial(jax.jit, donate_argnums=0)
def put_rows(blocks: jax.Array, rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns `blocks` [n, b, D], which are donated, with `vectors` [R, D] at `rows` int [R]."""
    return blocks.at[rows // blocks.shape[1], rows % blocks.shape[1]].set(vectors)
