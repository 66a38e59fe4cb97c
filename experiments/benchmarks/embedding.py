"""Passages embedded per second, as a share of the peak and against sentence-transformers.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.embedding
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.embedding --model=path/to/encoder --texts=2000

Both embed the same real passages (SQuAD's, from $FEDRAG_DATA) with the same model folder in float32,
from strings to vectors on the host, and must produce the same vectors. They take turns; the first turn
of each is not counted. sentence-transformers uses its defaults (texts sorted by length, all cores) and
the fastest of several batch sizes. Operations are those of the matrix products for real tokens, without
padding; the peak is the fastest product of square matrices. If PyTorch is absent, only the share of the
peak is measured. Prints one line of JSON, last.
"""

import importlib.util
import json
import statistics
import time

import numpy as np
from absl import app, flags

from experiments.benchmarks.peak import product_peak

_MODEL = flags.DEFINE_string("model", "minilm", "folder of an encoder, or minilm")
_TEXTS = flags.DEFINE_integer("texts", 512, "number of passages", lower_bound=8)
_REPEATS = flags.DEFINE_integer("repeats", 5, "number of turns per side", lower_bound=1)
_BATCHES = flags.DEFINE_multi_integer(
    "batch", [8, 16, 32, 64], "batch sizes to try for sentence-transformers"
)


def main(argv):
    del argv
    import jax

    from fedrag_jax.data import datasets
    from fedrag_jax.data.examples import embedding_text
    from fedrag_jax.models import hub
    from fedrag_jax.models.flops import encoder_flops
    from fedrag_jax.retrieval.embedding import embed_texts

    passages = datasets.load("squad").passages
    step = max(len(passages) // _TEXTS.value, 1)  # of all articles, so of all lengths
    texts = [embedding_text(p) for p in passages[::step]][: _TEXTS.value]
    model = hub.load(_MODEL.value)
    config = model.network.config
    lengths = [len(t) for t in model.tokenizer(texts, truncation=True,
                                               max_length=config.max_length)["input_ids"]]  # fmt: skip
    operations = sum(encoder_flops(config, n, trained=False) for n in lengths)

    def ours():
        return embed_texts(
            model.network, model.params, model.tokenizer, texts, max_length=config.max_length
        )

    runs, expected = {"ours": ours}, ours()
    if importlib.util.find_spec("sentence_transformers"):
        best, found = fastest(texts, config.max_length)
        runs["sentence_transformers"] = best
        gap = np.abs(unit(found) - unit(expected)).max()
        if gap > 1e-4:
            raise SystemExit(f"the two differ by {gap:.1e}; nothing to time")
    seconds, limit = {name: [] for name in runs}, 0.0
    for _ in range(_REPEATS.value):
        limit = max(limit, product_peak((512, 1024, 2048), "float32"))
        for name, run in runs.items():
            seconds[name].append(timed(run))
    took = {name: statistics.median(s) for name, s in seconds.items()}
    report = {"fraction_of_peak": round(operations / took["ours"] / limit, 3)}
    if "sentence_transformers" in took:
        ratio = took["sentence_transformers"] / took["ours"]
        report["vs_sentence_transformers"] = round(ratio, 2)
    report |= {f"{name}_texts_per_second": round(len(texts) / s, 1) for name, s in took.items()}
    report |= {
        "tokens": sum(lengths),
        "gflops_limit": round(limit / 1e9, 1),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(report))


def fastest(texts, max_length: int):
    """`(run, vectors)` of sentence-transformers at the batch size that takes it the least time."""
    from sentence_transformers import SentenceTransformer

    from fedrag_jax.models import fetching

    model = SentenceTransformer(str(fetching.place_of(_MODEL.value)), device=None)
    model.max_seq_length = max_length

    def run(size):
        return model.encode(texts, batch_size=size, show_progress_bar=False)

    found = run(_BATCHES.value[0])
    best = min(_BATCHES.value, key=lambda size: timed(lambda: run(size)))
    print(f"sentence-transformers: batch size {best} is fastest of {_BATCHES.value}", flush=True)
    return lambda: run(best), found


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    app.run(main)
