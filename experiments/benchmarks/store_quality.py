"""Retrieval quality of several kinds of stores on a public set, by the metrics of `Benchmarker`.

    python -m experiments.benchmarks.store_quality
    python -m experiments.benchmarks.store_quality --set=scifact --retriever=builtin:encoder

The passages of the set are embedded once. `flat` is exact. `words` is BM25 over unchanged words,
`stems` is BM25 with English stemming, and `hybrid` fuses stems and vectors by reciprocal rank. Prints a
table, and a line of JSON last.
"""

import json

from absl import app, flags

_SET = flags.DEFINE_string(
    "set", "scifact", "benchmark with passages, from `evaluation.benchmarks.sets`"
)
_RETRIEVER = flags.DEFINE_string("retriever", "minilm", "retriever: folder or name")
_LIMIT = flags.DEFINE_integer("limit", None, "number of questions to draw at random", lower_bound=1)


def main(argv):
    del argv
    from tabulate import tabulate

    from fedrag_jax.evaluation.benchmarks import reading, sets
    from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
    from fedrag_jax.rag import RAGSystem

    passages = reading.read(sets.named(_SET.value)).passages
    system = RAGSystem.build(passages, retriever=_RETRIEVER.value, progress=True)
    results = {}
    for name, store in empty_stores(system.retriever.vectors.shape[1]).items():
        store.add(passages, system.retriever.vectors)
        benchmarker = Benchmarker(system.over(store), progress=False)
        results[name] = benchmarker.run(_SET.value, limit=_LIMIT.value).metrics
    names = [*results["flat"]]
    rows = [
        [kind, *(f"{m[n].mean:.1f} [{m[n].low:.1f}, {m[n].high:.1f}]" for n in names)]
        for kind, m in results.items()
    ]
    print(tabulate(rows, ["store", *names]))
    found = {kind: {n: m[n].mean for n in names} for kind, m in results.items()}
    print(json.dumps({"set": _SET.value, "retriever": _RETRIEVER.value, "found": found}))


def empty_stores(dimension: int) -> dict:
    """A store of each kind."""
    from fedrag_jax.retrieval.stores.bm25 import BM25Store
    from fedrag_jax.retrieval.stores.faiss_store import FaissStore
    from fedrag_jax.retrieval.stores.hybrid import HybridStore

    return {
        "flat": FaissStore(dimension),
        "hnsw": FaissStore(dimension, "hnsw"),
        "ivf": FaissStore(dimension, "ivf"),
        "bm25": BM25Store(),
        "stems": BM25Store("english"),
        "hybrid": HybridStore([FaissStore(dimension), BM25Store("english")]),
    }


if __name__ == "__main__":
    app.run(main)
