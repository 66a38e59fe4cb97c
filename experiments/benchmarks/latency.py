"""Latency of `batch_query` by part: p50 and p99.

    python -m experiments.benchmarks.latency
    python -m experiments.benchmarks.latency --retriever=minilm --passages=50000 --batches=1,8

The system has a flat store with the passages of the built-in world, filled up with noise to the given
number. It is asked batches of questions that it was not asked before. `embed` embeds the questions,
`search` searches the store, `read` writes the answers from the passages found, and `whole` is
`batch_query` itself, measured separately on the same questions. Unmeasured batches come first, so that
little is compiled during the measurement. Prints a table, and a line of JSON last.
"""

import itertools
import json
import os
import time

import numpy as np
from absl import app, flags

_RETRIEVER = flags.DEFINE_string("retriever", "builtin:encoder", "retriever: folder or name")
_GENERATOR = flags.DEFINE_string("generator", "builtin:decoder", "generator: folder or name")
_STYLE = flags.DEFINE_string("prompt_style", "compact", "prompt style of the generator")
_PASSAGES = flags.DEFINE_integer(
    "passages", 20_000, "number of passages in the store", lower_bound=10
)
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "numbers of questions asked together")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 16, "maximum tokens per answer", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 50, "number of batches of each size", lower_bound=2)
WARMING = 200  # questions in batches of each size
PARTS = "embed", "search", "read", "whole"


def main(argv):
    del argv
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import jax
    from tabulate import tabulate

    system, questions = asked_system()
    report, rows = {}, []
    for size in map(int, _BATCHES.value):
        for _ in range(-(-WARMING // size)):
            measured(system, next_batch(questions, size))
        turns = [measured(system, next_batch(questions, size)) for _ in range(_REPEATS.value)]
        report[size] = {
            part: {
                f"p{p}_ms": round(1e3 * float(np.percentile([t[part] for t in turns], p)), 2)
                for p in (50, 99)
            }
            for part in PARTS
        }
        told = [f"{v['p50_ms']:.1f} / {v['p99_ms']:.1f}" for v in report[size].values()]
        each = report[size]["whole"]["p50_ms"] / size
        rows.append([size, *told, f"{1e3 / each:.0f}"])
    heads = ["batch", *(f"{part} p50 / p99 ms" for part in PARTS), "questions / s"]
    print(tabulate(rows, heads, disable_numparse=True))
    names = {"retriever": _RETRIEVER.value, "generator": _GENERATOR.value}
    print(
        json.dumps(
            {"batches": report, "passages": len(system.store), "repeats": _REPEATS.value}
            | names
            | {"max_new_tokens": _TOKENS.value, "device": jax.devices()[0].device_kind}
        )
    )


def asked_system():
    """A system over a store, and questions for it without end."""
    from fedrag_jax.data import synthetic
    from fedrag_jax.data.examples import Passage
    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.retrieval.stores.faiss_store import FaissStore

    world = synthetic.generate(synthetic.WorldConfig())
    system = RAGSystem.build(
        world.passages,
        generator=_GENERATOR.value,
        retriever=_RETRIEVER.value,
        prompt_style=_STYLE.value,
        max_answer_tokens=max(_TOKENS.value, 2),
        progress=True,
    )
    vectors = system.retriever.vectors
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(
        (max(_PASSAGES.value - len(vectors), 0), vectors.shape[1]), np.float32
    )
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    store = FaissStore(vectors.shape[1])
    store.add(world.passages, vectors)
    store.add([Passage(f"noise-{i}", "", f"Noise {i}.") for i in range(len(noise))], noise)
    texts = [e.question for e in [*world.test, *world.validation, *world.train]]
    # The number makes each a question of its own: what was tokenised before would be remembered.
    return system.over(store), (f"{t} {n}" for n in itertools.count() for t in texts)


def next_batch(questions, size: int) -> list[str]:
    """The next of the questions."""
    return [*itertools.islice(questions, size)]


def measured(system, questions: list[str]) -> dict[str, float]:
    """Seconds by part, of the same questions in two turns."""
    how, laps = {"max_new_tokens": _TOKENS.value}, [time.perf_counter()]
    vectors = system.retriever.embed_questions(questions)
    laps.append(time.perf_counter())
    found = system.store.search(questions, vectors, system.top_k)
    laps.append(time.perf_counter())
    system.read(questions, [[f.passage for f in some] for some in found], **how)
    laps.append(time.perf_counter())
    system.batch_query(questions, **how)
    laps.append(time.perf_counter())
    return dict(zip(PARTS, np.diff(laps).tolist(), strict=True))


if __name__ == "__main__":
    app.run(main)
