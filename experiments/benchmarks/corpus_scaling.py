"""Seconds and peak memory of each operation on a corpus, for growing corpora.

    python -m experiments.benchmarks.corpus_scaling
    python -m experiments.benchmarks.corpus_scaling --sizes=10000,100000 --kinds=flat,hnsw

For each size and kind of index, separate processes measure: embedding (a sample, extrapolated to all
texts), building the training index, searching 1,000 questions, refreshing 1% of the vectors, and saving
and opening a store of the same kind. Texts are generated, with 60 words each. Vectors are drawn from
topics, subtopics and noise, so that passages have near and far neighbours; a question is a passage with
noise. `peak_gb` is the peak resident memory of a process that opens the saved store and searches,
including memory-mapped pages; `build_gb` is the peak of building. `float16_recall_at_10` belongs to an
exact index in half precision. Prints tables, and last a line of JSON with linear extrapolations from
the two largest sizes to --extrapolate passages.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags
from tabulate import tabulate

from experiments.benchmarks.process_memory import peak

_SIZES = flags.DEFINE_list("sizes", ["10000", "100000", "1000000"], "corpus sizes, in passages")
_KINDS = flags.DEFINE_list(
    "kinds", ["flat", "ivf", "pq"], "kinds of index; hnsw takes long to build"
)
_ENCODER = flags.DEFINE_string("encoder", "builtin:encoder", "encoder of the sample of texts")
_SAMPLE = flags.DEFINE_integer("sample", 2000, "number of texts to embed", lower_bound=1)
_DIMENSION = flags.DEFINE_integer("dimension", 384, "dimension of a vector", lower_bound=8)
_QUESTIONS = flags.DEFINE_integer(
    "questions", 1000, "number of questions to search for", lower_bound=1
)
_EXTRAPOLATE = flags.DEFINE_integer(
    "extrapolate", 30_000_000, "corpus size of the extrapolation, in passages", lower_bound=1
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "folder of tables and vectors; default: a temporary folder"
)
_PART = flags.DEFINE_string(
    "part", "", "internal: the part of the benchmark to run in this process"
)
_SHARD = 16_384
# A quarter of the lists, the usual number, would look at more than recall needs.
OPTIONS = {"ivf": {"probes": 32}, "pq": {"probes": 64, "codes": 96}, "hnsw": {"effort": 128}}
DONE = ("embed", "build", "search", "refresh", "save", "open")


def main(argv):
    del argv
    if _PART.value:
        print(json.dumps(PARTS[_PART.value.split(":")[0]](*_PART.value.split(":")[1:])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(_FOLDER.value or temporary)
        rows = []
        for size in sorted(map(int, _SIZES.value)):
            common = _process("material", folder, size) | _process("embed", folder, size)
            for kind in _KINDS.value:
                row = {"passages": size, "index": kind} | common
                for part in ("build", "save", "open"):
                    row |= _process(part, folder, size, kind)
                rows.append(row)
                print(_told(row), file=sys.stderr, flush=True)
    columns = ("passages", "index", *DONE, "build_gb", "peak_gb", "recall_at_10",
               "float16_recall_at_10", "disk_gb")  # fmt: skip
    print(tabulate([[row[c] for c in columns] for row in rows], columns, floatfmt=".3g"))
    far = [_line(rows, kind) for kind in _KINDS.value] if len(_SIZES.value) > 1 else []
    if far:
        print(tabulate(far, "keys", floatfmt=".3g"))
    of_last = {row["index"]: row for row in rows if row["passages"] == rows[-1]["passages"]}
    told = {
        name: {kind: row[name] for kind, row in of_last.items()}
        for name in ("peak_gb", "recall_at_10", "float16_recall_at_10", "open", "build_gb")
    }
    print(json.dumps(told | {"passages": rows[-1]["passages"], "extrapolated": far}))


def _process(part: str, folder: pathlib.Path, *about) -> dict:
    """Returns the measurements of a fresh process."""
    told = ":".join(map(str, (part, folder, *about)))
    given = [flag.serialize() for flag in flags.FLAGS.get_key_flags_for_module(__name__)]
    command = [sys.executable, "-m", __spec__.name, *filter(None, given), f"--part={told}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _told(row: dict) -> str:
    seconds = ", ".join(f"{name} {row[name]:.2f} s" for name in DONE)
    return f"{row['passages']:,} {row['index']}: {seconds}; {row['peak_gb']:.2f} GB"


def _line(rows: list[dict], kind: str) -> dict:
    """Straight lines through the two largest sizes, at the size to come."""
    some = [row for row in rows if row["index"] == kind][-2:]
    found = {"index": kind, "passages": _EXTRAPOLATE.value}
    for name in (*DONE, "build_gb", "peak_gb", "disk_gb"):
        at = [(row["passages"], row[name]) for row in some]
        slope, start = np.polyfit(*zip(*at, strict=True), 1)
        found[name] = float(max(slope * _EXTRAPOLATE.value + start, 0.0))
    return found


# --- what lies on disk -----------------------------------------------------------------------------


def material(folder: str, size: str) -> dict:
    """Writes passages and vectors, shard by shard."""
    import datasets

    here, count = pathlib.Path(folder) / size, int(size)
    here.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    file = _vectors(here, count)
    for number in file.missing():
        rows = file.rows_of(number)
        file.write(number, drawn(count, np.arange(rows.start, rows.stop)), 0.0)
    path = here / "passages.parquet"
    if not path.exists():
        texts = datasets.Dataset.from_generator(
            generated, gen_kwargs={"count": count}, cache_dir=str(here / "cache")
        )
        texts.to_parquet(path)
    return {}


def _vectors(here: pathlib.Path, count: int):
    from fedrag_jax.retrieval.vector_file import VectorFile

    return VectorFile(here / "vectors", count, _SHARD)


def generated(count: int):
    """Rows of passages of 60 words."""
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"])
    for row in range(count):
        text = " ".join(rng.choice(words, 60))
        yield {"id": str(row), "title": f"Page {row // 10}", "text": text}


def drawn(count: int, rows: np.ndarray) -> np.ndarray:
    """Unit vectors [R, D] of passages: a topic, one of its subtopics, and noise."""
    topics = max(int(count**0.5), 8)
    topic, subtopic = rows % topics, rows % (topics * 8)
    parts = (_normal("topic", topic), 0.7 * _normal("subtopic", subtopic), _normal("own", rows))
    return _unit(sum(parts[1:], parts[0]))


def _normal(name: str, numbers: np.ndarray) -> np.ndarray:
    """Standard normal vectors [R, D], the same for equal names and numbers."""
    used, place = np.unique(numbers, return_inverse=True)
    found = np.empty((len(used), _DIMENSION.value), np.float32)
    for i, number in enumerate(used.tolist()):
        rng = np.random.Generator(np.random.SFC64([number, *name.encode()]))
        rng.standard_normal(out=found[i], dtype=np.float32)
    return found[place]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def questions(count: int) -> np.ndarray:
    """Vectors [Q, D]: passages with noise."""
    asked = np.random.default_rng(1).integers(0, count, _QUESTIONS.value)
    noise = _unit(_normal("question", np.arange(len(asked))))
    return _unit(drawn(count, asked) + 0.5 * noise)


# --- what is measured ------------------------------------------------------------------------------


def embed(folder: str, size: str) -> dict:
    """Seconds that all texts would take, by those of a sample."""
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.embedding import embed_texts
    from fedrag_jax.retrieval.passage_texts import PassageTexts

    model, table = hub.load(_ENCODER.value), _table(folder, size)
    texts = PassageTexts(table, model.network.config)
    some = texts[: _SAMPLE.value]
    how = {"max_length": model.network.config.max_length}
    embed_texts(model.network, model.params, model.tokenizer, some, **how)  # compiles
    start = time.perf_counter()
    embed_texts(model.network, model.params, model.tokenizer, some, **how)
    seconds = time.perf_counter() - start
    return {"embed": seconds * int(size) / len(some)}


def build(folder: str, size: str, kind: str) -> dict:
    """The index of training: made, searched, compared with an exact one, and refreshed."""
    from fedrag_jax.retrieval.index.by_name import index_kind
    from fedrag_jax.retrieval.index.faiss_index import FaissIndex

    here, count = pathlib.Path(folder) / size, int(size)
    vectors, asked = _vectors(here, count).read(), questions(count)
    make = index_kind(kind, OPTIONS.get(kind, {}))
    index, built = _timed(make, None, vectors)
    index.search(asked[:2], 10)
    (found, _), searched = _timed(index.search, asked, 10)
    memory = peak() / 1e9
    nearest, _ = FaissIndex.build(vectors).search(asked, 10)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)])
    half, _ = FaissIndex.build(vectors.astype(np.float16)).search(asked[:100], 10)
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(nearest, half, strict=False)])
    rows = np.random.default_rng(2).permutation(count)[: count // 100]
    fresh = _unit(_normal("fresh", rows))
    _, refreshed = _timed(index.replace, rows, fresh)
    del index
    return {
        "build": built, "search": searched, "refresh": refreshed, "build_gb": memory,
        "recall_at_10": float(recall), "float16_recall_at_10": float(kept),
    }  # fmt: skip


def save(folder: str, size: str, kind: str) -> dict:
    """The store that is opened afterwards."""
    from fedrag_jax.retrieval.stores.faiss_store import FaissStore

    here, count = pathlib.Path(folder) / size, int(size)
    vectors, table = _vectors(here, count).read(), _table(folder, size)
    store = FaissStore(vectors.shape[1], kind, **OPTIONS.get(kind, {}))
    for start in range(0, count, 100_000):
        store.add(table[start : start + 100_000], np.array(vectors[start : start + 100_000]))
    _, seconds = _timed(store.save, here / kind)
    disk = sum(path.stat().st_size for path in (here / kind).rglob("*") if path.is_file())
    return {"save": seconds, "disk_gb": disk / 1e9}


def opened(folder: str, size: str, kind: str) -> dict:
    """Measures a process that opens the store and searches it."""
    from fedrag_jax.retrieval.stores.registry import open_store

    here, count = pathlib.Path(folder) / size, int(size)
    store, seconds = _timed(open_store, here / kind, True)
    asked = questions(count)
    for start in range(0, len(asked), 100):
        store.search([""] * len(asked[start : start + 100]), asked[start : start + 100], 10)
    return {"open": seconds, "peak_gb": peak() / 1e9}


PARTS = {"material": material, "embed": embed, "build": build, "save": save, "open": opened}


def _table(folder: str, size: str):
    import datasets

    from fedrag_jax.data.outside_corpora import read

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = pathlib.Path(folder) / size / "cache"
    return read(str(pathlib.Path(folder) / size / "passages.parquet"))


def _timed(call, *args):
    start = time.perf_counter()
    found = call(*args)
    return found, time.perf_counter() - start


if __name__ == "__main__":
    app.run(main)
