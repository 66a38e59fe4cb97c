"""Exact nearest-neighbour search over a corpus on the device: a GPU, a TPU, or a CPU through XLA.

A matrix product and `jax.lax.top_k`, block after block of the corpus. `jax.lax.approx_max_k` would be
no faster: but on a TPU it looks at everything too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.retrieval.index.vector_index import VectorIndex

# Scores held at once, whatever the corpus: 256 queries by 16,384 passages are 16 MiB.
BLOCK = 16384
_QUERIES = 256
TILE = 128  # blocks are multiples of this: products of a ragged edge may be rounded otherwise


class DeviceIndex(VectorIndex):
    """Vectors lie on JAX's default device, in blocks of equal size."""

    def __init__(self, ids: tuple[str, ...], vectors: np.ndarray):
        super().__init__(ids, vectors)
        blocks = -(-len(ids) // BLOCK)
        block = -(-len(ids) // (blocks * TILE)) * TILE
        padded = np.zeros((blocks * block, self.dimension), np.float32)
        padded[: len(self)] = vectors
        self._blocks = jax.device_put(padded.reshape(blocks, block, self.dimension))

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D], a read-only copy on the host: `replace` is the way to change them."""
        return np.asarray(self._blocks).reshape(-1, self.dimension)[: len(self)]

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search_blocks(self._blocks, len(self), queries, k)

    def _replace(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._blocks = put_rows(self._blocks, rows, vectors)


def search_blocks(
    blocks: jax.Array, count: int, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 and scores float32 [Q, k] among the first `count` rows of `blocks` [n, b, D].

    Equal scores are ordered by row.
    """
    rows, scores = [], []
    for start in range(0, len(queries), _QUERIES):
        some = queries[start : start + _QUERIES]
        # Widths are powers of two, so that few programs are compiled.
        padded = np.zeros((1 << (len(some) - 1).bit_length(), queries.shape[1]), np.float32)
        padded[: len(some)] = some
        found = _nearest(blocks, count, padded, k)
        rows.append(found[0][: len(some)])
        scores.append(found[1][: len(some)])
    return np.concatenate(jax.device_get(rows)), np.concatenate(jax.device_get(scores))


@partial(jax.jit, static_argnames="k")
def _nearest(blocks: jax.Array, count, queries: jax.Array, k: int):
    """Rows and scores [Q, k] of `queries` [Q, D] over `blocks` [n, b, D], of which `count` rows count.

    top_k keeps the first of equals. Those found before come first and have lower rows, hence equal
    scores are ordered by row.
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
    return jax.lax.scan(step, none, (jnp.arange(len(blocks), dtype=jnp.int32), blocks))[0]


@partial(jax.jit, donate_argnums=0)
def put_rows(blocks: jax.Array, rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """`blocks` [n, b, D], which are given up, with `vectors` [R, D] at `rows` int [R]."""
    return blocks.at[rows // blocks.shape[1], rows % blocks.shape[1]].set(vectors)
