"""The measured peak of this device: operations per second of matrix products."""

import time
from collections.abc import Sequence


def product_peak(sizes: Sequence[int], dtype: str) -> float:
    """Operations a second of the best of ten products of square matrices, of the best size."""
    import jax

    best, multiply = 0.0, jax.jit(lambda x: x @ x)
    for n in sizes:
        x = jax.random.normal(jax.random.key(0), (n, n), dtype)
        for _ in range(10):
            start = time.perf_counter()
            multiply(x).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
