"""Exact search on JAX's default device, compared with a flat FAISS index on the host.

    python -m experiments.benchmarks.search
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.search --sizes=1000,10000,100000

Both are stores of `fedrag_jax/retrieval`, which return the same rows and scores, with equal scores in
the order of rows. Input and output are arrays on the host. Vectors contain small whole numbers, so that
every sum is exact in float32 and results must be equal to the last bit. The two take turns; the first
turn of each (compilation, warm-up) is not counted, and medians are reported. `crossover` is, for each
batch size, the smallest corpus from which the device is always faster, or null if there is none. Prints
a line of JSON last.
"""

import json
import os
import statistics
import time

import numpy as np
from absl import app, flags

_SIZES = flags.DEFINE_list(
    "sizes", ["1000", "10000", "100000", "1000000"], "corpus sizes, in passages"
)
_BATCHES = flags.DEFINE_list("batches", ["1", "32", "256"], "numbers of queries searched together")
_DIMENSION = flags.DEFINE_integer("dimension", 384, "dimension of a vector", lower_bound=1)
_K = flags.DEFINE_integer("k", 10, "number of passages to find", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "number of turns per index", lower_bound=1)
_SIDES = "device", "faiss"


def main(argv):
    del argv
    # FAISS's threads would spin while they wait, and keep JAX's from the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import faiss
    import jax

    sizes, batches = (sorted(map(int, flag.value)) for flag in (_SIZES, _BATCHES))
    found = {side: {batch: {} for batch in batches} for side in _SIDES}
    for size in sizes:
        stores = built(size)
        for batch in batches:
            for side, ms in milliseconds(stores, whole_numbers(batch, seed=1)).items():
                found[side][batch][size] = ms
            told = ", ".join(f"{side} {found[side][batch][size]:.2f} ms" for side in _SIDES)
            print(f"{size:8d} passages, {batch:4d} queries: {told}", flush=True)
    report = {"crossover": {b: crossover(*(found[side][b] for side in _SIDES)) for b in batches}}
    report |= {f"{side}_ms": found[side] for side in _SIDES}
    report |= {
        "dimension": _DIMENSION.value,
        "k": _K.value,
        "repeats": _REPEATS.value,
        "device": jax.devices()[0].device_kind,
        "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
    }
    print(json.dumps(report))


def whole_numbers(count: int, seed: int) -> np.ndarray:
    """Vectors float32 [count, D] whose inner products are exact, in whatever order they are summed."""
    most = int((2**24 / _DIMENSION.value) ** 0.5)
    rng = np.random.default_rng(seed)
    shape = count, _DIMENSION.value
    return rng.integers(-most, most, shape, np.int32, endpoint=True).astype(np.float32)


def built(size: int) -> dict:
    """The two indexes over the same vectors."""
    from fedrag_jax.retrieval.index.device_index import DeviceIndex
    from fedrag_jax.retrieval.index.faiss_index import FaissIndex

    vectors = whole_numbers(size, seed=0)
    return {"device": DeviceIndex.build(vectors), "faiss": FaissIndex.build(vectors)}


def milliseconds(stores: dict, queries: np.ndarray) -> dict[str, float]:
    """Returns the median time of each store.

    Raises:
      AssertionError: they differ in what they find.
    """
    results = {side: store.search(queries, _K.value) for side, store in stores.items()}
    for ours, theirs in zip(*results.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    seconds = {side: [] for side in stores}
    for _ in range(_REPEATS.value):
        for side, store in stores.items():
            start = time.perf_counter()
            store.search(queries, _K.value)
            seconds[side].append(time.perf_counter() - start)
    return {side: round(1e3 * statistics.median(s), 3) for side, s in seconds.items()}


def crossover(device: dict[int, float], faiss: dict[int, float]) -> int | None:
    """The smallest size from which on the device takes less time at every size."""
    won = None
    for size in sorted(device, reverse=True):
        if device[size] >= faiss[size]:
            break
        won = size
    return won


if __name__ == "__main__":
    app.run(main)
