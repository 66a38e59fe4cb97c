"""Runs of benchmarks that stop and go on, are kept apart, and become files and tables."""

import dataclasses
import json
import os
import pathlib

import jax
import pytest
from asked import PASSAGES
from cross_encoders import counting

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.benchmarks import results
from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
from fedrag_jax.evaluation.benchmarks.identity import identity
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.hybrid import HybridStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.reranked import RerankedStore

REAL = pathlib.Path(os.environ.get("FEDRAG_DATA", "../shared/data"))


class GoesAway(FaissStore):
    """A store that cannot be reached any more after some searches."""

    left = 2

    def _search(self, *asked):
        self.left -= 1
        if self.left < 0:
            raise StoreUnreachable("gone")
        return super()._search(*asked)


def same(a, b):
    def without(result):
        return [{n: v for n, v in row.items() if n != "seconds"} for row in result.rows]

    return without(a) == without(b) and a.metrics == b.metrics


def test_a_run_that_was_stopped_goes_on_where_it_was(system, run, tmp_path):
    store = GoesAway(system.retriever.vectors.shape[1])
    store.add(PASSAGES, system.embed(PASSAGES))
    over = system.over(store)
    how = {"using": over, "limit": 8, "batch_size": 2}
    with pytest.raises(StoreUnreachable):
        run("squad", tmp_path / "a", **how)
    (rows,) = (tmp_path / "a").rglob("rows.jsonl")
    assert len(rows.read_text().splitlines()) == 1 + 4
    store.left = 100
    whole = run("squad", tmp_path / "b", **how)
    assert store.left == 96
    assert same(run("squad", tmp_path / "a", **how), whole) and store.left == 94
    # What is there is read back; a larger sample asks the rest alone.
    assert same(run("squad", tmp_path / "a", **how), whole) and store.left == 94
    run("squad", tmp_path / "a", **how | {"limit": 10})
    assert store.left == 93


def test_a_line_cut_in_two_is_asked_again(run, tmp_path):
    whole = run("squad", tmp_path, limit=6)
    (rows,) = tmp_path.rglob("rows.jsonl")
    text = rows.read_bytes()
    lines = text.splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:3]) + lines[3][:25])
    for _ in range(2):  # asks what is missing, and reads what was written then
        assert same(run("squad", tmp_path, limit=6), whole)
    assert len(rows.read_bytes().splitlines()) == 7
    rows.write_bytes(lines[0][:30])  # killed at its first line
    assert same(run("squad", tmp_path, limit=6), whole)
    rows.write_bytes(b"".join(lines[:3]) + b"{...\n" + b"".join(lines[4:]))
    with pytest.raises(DataError, match=r"rows\.jsonl:4 is damaged .*delete that line"):
        run("squad", tmp_path, limit=6)


def test_another_run_is_not_mixed_in(system, run, tmp_path):
    run("squad", tmp_path, limit=2)
    with pytest.raises(
        ConfigError, match=r"another run \(settings\.seed: 0 then, 1 now\): .*folder"
    ):
        run("squad", tmp_path, limit=2, seed=1)
    noise = jax.tree.map(lambda x: x + 0.01, system.adapters)
    with pytest.raises(ConfigError, match=r"\(system\.adapters: '\w{16}' then, '\w{16}' now\)"):
        run("squad", tmp_path, limit=2, using=system.replace(adapters=noise))
    fewer = RAGSystem.build(PASSAGES[:-1], top_k=1)
    with (
        pytest.warns(UserWarning, match="2 of 24 positive_ids name none of the 20 passages"),
        pytest.raises(ConfigError, match=r"system\.corpus: "),
    ):
        run("squad", tmp_path, limit=2, using=fewer)
    # Another way to ask, or to read, has a folder of its own.
    run("squad", tmp_path, limit=2, corpus="none")
    assert len([*tmp_path.rglob("result.json")]) == 2


def test_results_are_json_and_tables(run, tmp_path):
    result = run("squad_v2", tmp_path, limit=12)
    (path,) = tmp_path.rglob("result.json")
    kept = json.loads(path.read_text())
    assert kept["n"] == 12 and kept["metrics"]["em"] == result.metrics["em"]._asdict()
    assert kept["settings"]["split"] == "validation" and len(kept["origin"]["content"]) == 16
    assert kept["origin"]["questions"] == 24 and kept["seconds"] > 0
    has, none = (result.metrics[f"{n}answerable_em"].n for n in ("", "un"))
    assert has + none == 12 and 0 < none < 12
    text = results.table([result], metrics=["f1", "em"])
    mean, low, high, _ = result.metrics["em"]
    first, second = text.splitlines()[2:]
    assert (
        f"em * | {mean:.1f} [{low:.1f}, {high:.1f}]" in " ".join(first.split()) and "f1" in second
    )
    assert r"\toprule" in results.table([result], "latex")
    with pytest.raises(ConfigError, match="a table's form must be one of"):
        results.table([result], "csv")


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "mmlu.jsonl.gz").is_file(), reason=f"no real data in {REAL}: FEDRAG_DATA"
)
@pytest.mark.filterwarnings("ignore:pubmedqa. 500 of 500 positive_ids name none")  # of this system
def test_real_sets_from_end_to_end(system, tmp_path):
    benchmarker = Benchmarker(system, tmp_path, progress=False)
    ways = {
        "mmlu": {"shots": 2}, "popqa": {"corpus": "benchmark", "shots": 1}, "squad": {"corpus": "gold"},
        "hotpotqa": {"corpus": "gold", "mode": "concatenated"}, "pubmedqa": {"by": "likelihood"},
        "scifact": {"corpus": "benchmark"},
    }  # fmt: skip
    found = [benchmarker.run(n, source=REAL, limit=8, **how) for n, how in ways.items()]
    assert all(r.n == 8 and r.metrics[r.first].n == 8 for r in found)
    assert results.table(found).count(" *") == len(ways)
    again = [benchmarker.run(n, source=REAL, limit=8, **how) for n, how in ways.items()]
    assert all(map(same, found, again))


def test_another_search_is_another_system(system):
    def search(*stores):
        found = []
        for store in stores:
            store.add(PASSAGES, system.embed(PASSAGES))
            found.append(identity(system.over(store), True, PASSAGES)["search"])
        return found

    d = system.retriever.vectors.shape[1]
    stores = [
        FaissStore(d), FaissStore(d, "hnsw"), FaissStore(d, "hnsw", effort=1),
        BM25Store(), BM25Store("english"), HybridStore([FaissStore(d), BM25Store()]),
        HybridStore([FaissStore(d), BM25Store("english")]),
        RerankedStore(FaissStore(d), counting(["ann"])),
        RerankedStore(FaissStore(d), counting(["ann", "bob"])),
    ]  # fmt: skip
    assert len({*search(*stores)}) == len(stores)
    assert len({*search(FaissStore(d), FaissStore(d))}) == 1


def test_rows_of_another_way_to_search_are_not_read_back(system, run, tmp_path):
    shy = system.searching._replace(budget=system.searching.budget._replace(turns=0))
    other = dataclasses.replace(system, searching=shy)
    how = {"limit": 2, "mode": "search"}
    whole = run("squad", tmp_path, **how)
    assert same(run("squad", tmp_path, **how), whole)
    with pytest.raises(ConfigError, match=r"searching\.budget\.turns: 2 then, 0 now"):
        run("squad", tmp_path, using=other, **how)
    # What does not search does not depend on it.
    usual = run("squad", tmp_path / "usual", limit=2)
    assert same(run("squad", tmp_path / "usual", using=other, limit=2), usual)
