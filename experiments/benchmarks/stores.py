"""Time and memory to build, save, open and search a store of 100,000 passages.

    python -m experiments.benchmarks.stores
    python -m experiments.benchmarks.stores --kinds=flat,hnsw --passages=1000000 --budget_mb=8000

Each kind is built in one process and opened in another. Peaks of memory belong to these processes and
include the interpreter, the libraries and the added passages. Vectors are drawn around centres, texts
from words with Zipf frequencies. `add` and `search` take one passage and one question at a time.
`found` is the share of the ten nearest passages of an exact search that are among the ten found; stores
that search by words have none. A peak above the budget ends the program with exit code 1. Prints a
table, and a line of JSON last.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from experiments.benchmarks.process_memory import peak

KINDS = ("flat", "hnsw", "ivf", "pq", "device", "bm25", "hybrid", "mapped")

_KINDS = flags.DEFINE_list(
    "kinds", [*KINDS], "kinds of store; `mapped` is flat, opened memory-mapped"
)
_PASSAGES = flags.DEFINE_integer(
    "passages", 100_000, "number of passages in the store", lower_bound=100
)
_DIMENSION = flags.DEFINE_integer("dimension", 384, "dimension of a vector", lower_bound=8)
_WORDS = flags.DEFINE_integer("words", 100, "words per passage", lower_bound=1)
_REPEATS = flags.DEFINE_integer(
    "repeats", 200, "number of searches and of added passages", lower_bound=2
)
_BUDGET = flags.DEFINE_integer(
    "budget_mb", 1500, "maximum peak memory of each process, in 1e6 bytes"
)
_PART = flags.DEFINE_enum(
    "part", "", ["", "build", "open"], "internal: the part to run in a child process"
)
_FOLDER = flags.DEFINE_string("folder", "", "internal: the store's folder for a child process")

HEADS = ("kind", "build s", "save s", "on disk MB", "build peak MB", "open s", "open peak MB",
         "search p50 ms", "p99 ms", "add p50 ms", "p99 ms", "found")  # fmt: skip


def main(argv):
    del argv
    if unknown := {*_KINDS.value} - {*KINDS}:
        raise app.UsageError(f"--kinds: {sorted(unknown)} unknown; choose among {[*KINDS]}")
    if _PART.value:
        (kind,) = _KINDS.value
        print(json.dumps({"build": built, "open": opened}[_PART.value](kind)))
        return
    from tabulate import tabulate

    report = {}
    for kind in _KINDS.value:
        with tempfile.TemporaryDirectory() as folder:
            report[kind] = child(kind, "build", folder) | child(kind, "open", folder)
        print(f"{kind}: {report[kind]}", file=sys.stderr, flush=True)
    print(tabulate([[k, *v.values()] for k, v in report.items()], HEADS, missingval="–"))
    peaks = {k: max(v["build_peak_mb"], v["open_peak_mb"]) for k, v in report.items()}
    sizes = {"passages": _PASSAGES.value, "dimension": _DIMENSION.value, "words": _WORDS.value}
    print(json.dumps({"kinds": report, "budget_mb": _BUDGET.value} | sizes))
    if over := {kind: most for kind, most in peaks.items() if most > _BUDGET.value}:
        raise SystemExit(f"over the budget of {_BUDGET.value} MB: {over}")


def child(kind: str, part: str, folder: str) -> dict:
    """Measures one step; runs in a separate process."""
    flags_ = [f"--{f.name}={f.value}" for f in (_PASSAGES, _DIMENSION, _WORDS, _REPEATS)]
    command = [sys.executable, "-m", __spec__.name, f"--kinds={kind}", f"--part={part}"]
    done = subprocess.run(
        [*command, f"--folder={folder}", *flags_], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def vectors_of(count: int, seed: int) -> np.ndarray:
    """Unit vectors float32 [count, D] around as many centres as a hundredth of the passages."""
    centres = np.random.default_rng(0).standard_normal(
        (max(_PASSAGES.value // 100, 1), _DIMENSION.value), np.float32
    )
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, _DIMENSION.value), np.float32)
    vectors += centres[rng.integers(len(centres), size=count)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def texts_of(count: int, seed: int) -> list[str]:
    """Texts of words that are as frequent as those of a language."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.3, (count, _WORDS.value)), 100_000)
    return [" ".join(f"w{rank}" for rank in row) for row in ranks.tolist()]


def passages_of(count: int, seed: int, first: int = 0):
    """Passages with ids from `first` on."""
    from fedrag_jax.data.examples import Passage

    return [Passage(f"p{first + i}", "", text) for i, text in enumerate(texts_of(count, seed))]


def empty(kind: str):
    """A store of the kind."""
    from fedrag_jax.retrieval.stores.bm25 import BM25Store
    from fedrag_jax.retrieval.stores.device_store import DeviceStore
    from fedrag_jax.retrieval.stores.faiss_store import FaissStore
    from fedrag_jax.retrieval.stores.hybrid import HybridStore

    dimension = _DIMENSION.value
    if kind == "device":
        return DeviceStore(dimension)
    if kind == "bm25":
        return BM25Store()
    if kind == "hybrid":
        return HybridStore([FaissStore(dimension), BM25Store()])
    return FaissStore(dimension, "flat" if kind == "mapped" else kind)


def built(kind: str) -> dict:
    """Builds and saves a store."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    store, passages = empty(kind), passages_of(_PASSAGES.value, seed=1)
    vectors, start = vectors_of(len(passages), seed=1), time.perf_counter()
    store.add(passages, vectors)
    build, start = time.perf_counter() - start, time.perf_counter()
    store.save(_FOLDER.value)
    save = time.perf_counter() - start
    files = (p for p in pathlib.Path(_FOLDER.value).rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files) / 1e6
    told = {"build_s": build, "save_s": save, "disk_mb": size}
    return {name: round(value, 1) for name, value in told.items()} | {
        "build_peak_mb": round(peak() / 1e6)
    }


def opened(kind: str) -> dict:
    """Opens it, searches it and adds to it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fedrag_jax.retrieval.stores.registry import open_store

    start = time.perf_counter()
    store = open_store(_FOLDER.value, memory_map=kind == "mapped")
    opening, n = time.perf_counter() - start, _REPEATS.value
    asked, questions = vectors_of(n, seed=2), texts_of(n, seed=2)
    store.search(questions[:1], asked[:1], 10)
    search, found = [], []
    for question, vector in zip(questions, asked, strict=True):
        start = time.perf_counter()
        (some,) = store.search([question], vector[None], 10)
        search.append(time.perf_counter() - start)
        found.append({f.passage.id for f in some})
    most = round(peak() / 1e6)
    add = []
    if not store.read_only:
        new = zip(passages_of(n, seed=3, first=_PASSAGES.value), vectors_of(n, seed=3), strict=True)
        for passage, vector in new:
            start = time.perf_counter()
            store.add([passage], vector[None])
            add.append(time.perf_counter() - start)
    told = {"open_s": round(opening, 1), "open_peak_mb": most}
    told |= percentiles("search", search) | percentiles("add", add)
    return told | {"found": None if kind in ("bm25", "hybrid") else share_found(asked, found)}


def percentiles(what: str, seconds: list[float]) -> dict:
    """The median and the 99th percentile in milliseconds; None of nothing."""
    if not seconds:
        return {f"{what}_p50_ms": None, f"{what}_p99_ms": None}
    middle, last = statistics.median(seconds), np.quantile(seconds, 0.99)
    return {
        f"{what}_p50_ms": round(1e3 * middle, 2),
        f"{what}_p99_ms": round(1e3 * float(last), 2),
    }


def share_found(asked: np.ndarray, found: list[set[str]]) -> float:
    """Returns the share of each question's ten exact nearest neighbours that were found."""
    vectors = vectors_of(_PASSAGES.value, seed=1)
    nearest = np.argpartition(-(asked @ vectors.T), 9, axis=1)[:, :10]
    hits = [len({f"p{i}" for i in row} & ids) for row, ids in zip(nearest, found, strict=True)]
    return round(sum(hits) / nearest.size, 3)


if __name__ == "__main__":
    app.run(main)
