"""The benchmarks run and report what they promise, on sizes that mean nothing."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.benchmarks import federated_round, process_memory
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.lora import LoraConfig, add_lora
from fedrag_jax.models.network import Network, flatten, unflatten
from fedrag_jax.objectives.generator import AnswerLoss

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *flags):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
def test_memory_of_a_round():
    pytest.importorskip("qwix", reason="qwix is absent")
    report = run("memory", "--model=small", "--clients=2", "--tokens=32", "--batch_size=1")
    planned = report["arithmetic_GB"]
    kernels = 8 * 1024 * (2 * 1024 + 2 * 256 + 3 * 3584)  # four bits each, two for 64 as a scale
    tables = 2 * 2 * 32000 * 1024
    assert planned["base"] == pytest.approx((kernels * (4 / 8 + 2 / 64) + tables) / 1e9, rel=1e-2)
    assert report["compiler_GB"]["arguments"] == pytest.approx(planned["base"], rel=0.05)


def test_peak_memory_of_a_process_is_not_that_of_its_parent():
    held = bytearray(b"1") * 400_000_000
    code = "from experiments.benchmarks.process_memory import peak; print(peak())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process_memory.peak() > len(held) > 4 * int(run.stdout)


def test_decoding_against_transformers():
    pytest.importorskip("torch", reason="PyTorch is absent")
    report = run("decode", "--batch=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1")
    assert report["ours_tokens_per_second"] > 0 and report["transformers_tokens_per_second"] > 0


def test_search_on_the_device_against_faiss():
    report = run("search", "--sizes=300,40,2000", "--batches=1,20", "--dimension=16", "--repeats=1")
    for batch in ("1", "20"):
        ours, theirs = (report[side][batch] for side in ("device_ms", "faiss_ms"))
        assert [*ours] == [*theirs] == ["40", "300", "2000"] and min(theirs.values()) > 0
        wins = [ours[size] < theirs[size] for size in ours]
        always = [int(size) for i, size in enumerate(ours) if all(wins[i:])]
        assert report["crossover"][batch] == (min(always) if always else None)


def test_fedrag_is_asked_for_where_it_is_absent():
    command = [sys.executable, "-m", "experiments.benchmarks.against_fedrag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "fedrag_requirements.txt" in done.stderr


def test_federated_round_against_pytorch():
    pytest.importorskip("torch", reason="PyTorch is absent")
    pytest.importorskip("peft", reason="peft is absent")
    tiny = "--layers=2 --hidden_size=16 --intermediate_size=32 --heads=2 --vocabulary=64 --rank=2"
    few = "--clients=1,3 --tokens=16 --answer_tokens=4 --compile= --repeats=1"
    report = run("federated_round", *tiny.split(), *few.split())
    assert report["clients"] == 3 and 0 < report["fraction_of_peak"] < 1
    assert len(report["ms_per_client_step"]) == 4


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("scored", [4, 31], ids=["answers", "all"])
def test_operations_are_those_of_the_traced_gradient(scored, kv):
    sizes = {"hidden": 128, "intermediate": 512, "vocabulary": 1024, "rank": 4, "keys": 32 * kv}
    layers, tokens, rows = 3, 32, 2
    config = DecoderConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=512, num_layers=layers, num_heads=4,
        num_kv_heads=kv, head_dim=32, remat="none",
    )  # fmt: skip
    base = Network.of(Decoder, config)
    network = add_lora(base, LoraConfig(4, 8.0, federated_round.TARGETS))
    adapters = {p: x for p, x in flatten(network.shapes()) if p[-1].startswith("lora_")}
    batch = {
        "tokens": np.zeros((rows, 1, tokens), np.int32),
        "lengths": np.full((rows, 1), tokens),
        "answer_positions": np.tile(np.arange(tokens - scored, tokens), (rows, 1, 1)),
        "answer_mask": np.ones((rows, scored)),
        "weight": np.ones(rows),
    }
    gradient = jax.grad(AnswerLoss(network), has_aux=True)
    traced = jax.make_jaxpr(gradient)(
        {"adapters": unflatten(adapters.items())}, {"decoder": base.shapes()}, batch, None
    )
    needed = rows * federated_round.products(layers, tokens=tokens, scored=scored, **sizes)
    # Attention is computed for later tokens too, and masked.
    assert needed < operations(traced.jaxpr) < 1.05 * needed


@pytest.mark.slow
def test_all_there_is_to_know_of_an_accelerator(tmp_path):
    report = accelerator("--seconds=900", f"--runs={tmp_path}")
    assert report.pop("failed") == []
    assert [*report] == ["round", "embedding", "decode", "search", "sweep", "real"]
    assert [*report["round"]["client_steps_per_second"]] == ["1", "2"]
    cell = report["real"]["generator-centralised-seed0"]
    assert 0 <= cell["em_percent"] <= cell["f1_percent"] <= 100 and cell["trained_seconds"] > 0


def test_a_part_without_time_is_reported_and_the_rest_goes_on(tmp_path):
    # Both train, so neither ends within a second on any machine.
    report = accelerator("--seconds=2", "--only=sweep,real", f"--runs={tmp_path}")
    assert report["failed"] == ["sweep", "real"]
    assert report["sweep"]["trouble"].endswith("stopped after 1 s")


def accelerator(*flags) -> dict:
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator", "--small", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_store_is_built_saved_and_searched():
    kinds = "flat", "pq", "bm25", "mapped"
    report = run("stores", f"--kinds={','.join(kinds)}", "--passages=2000", "--repeats=5")
    assert [*report["kinds"]] == [*kinds]
    assert report["kinds"]["flat"]["found"] == report["kinds"]["mapped"]["found"] == 1.0
    assert report["kinds"]["mapped"]["add_p50_ms"] is None
    assert all(0 < v["search_p50_ms"] <= v["search_p99_ms"] for v in report["kinds"].values())


@pytest.mark.slow
def test_how_often_intervals_hold_the_truth():
    report = run(
        "interval_coverage", "--seeds=1,3", "--spreads=0,30", "--questions=50", "--repeats=60"
    )
    rows = {(r["seeds"], r["spread"]): r for r in report["rows"]}
    assert rows[3, 0.0]["coverage"] > 0.9 > 0.5 > rows[1, 30.0]["coverage"]


@pytest.mark.slow
def test_waiting_for_answers_by_part():
    report = run("latency", "--passages=2500", "--repeats=5", "--batches=2")
    parts = report["batches"]["2"]
    whole = parts.pop("whole")
    assert report["passages"] == 2500
    assert 0.5 < whole["p50_ms"] / sum(part["p50_ms"] for part in parts.values()) < 2


@pytest.mark.slow
def test_what_stores_find_of_a_set():
    if not (ROOT / "../shared/data/scifact.questions.jsonl.gz").exists():
        pytest.skip("../shared/data has no scifact")
    report = run("store_quality", "--retriever=builtin:encoder", "--limit=60")
    found = {kind: metrics["ndcg_at_10"] for kind, metrics in report["found"].items()}
    assert found["flat"] == pytest.approx(found["hnsw"], abs=3)
    assert found["bm25"] > 50 > found["flat"]  # this encoder knows another world


def operations(jaxpr) -> int:
    """Of the products, two for each multiplication."""
    total = 0
    for step in jaxpr.eqns:
        if step.primitive.name == "dot_general":
            contracted = step.params["dimension_numbers"][0][0]
            shared = np.prod([step.invars[0].aval.shape[i] for i in contracted])
            total += 2 * step.outvars[0].aval.size * int(shared)
        inside = sum(map(operations, jaxprs_in_params(step.params)))
        total += inside * step.params.get("length", 1)
    return total
