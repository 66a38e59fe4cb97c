"""The benchmarks run and report what they promise, on sizes that mean nothing."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *flags):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_memory_of_a_round():
    pytest.importorskip("qwix", reason="qwix is absent")
    report = run("memory", "--model=small", "--clients=2", "--tokens=32", "--batch_size=1")
    planned = report["arithmetic_GB"]
    kernels = 8 * 1024 * (2 * 1024 + 2 * 256 + 3 * 3584)  # four bits each, two for 64 as a scale
    tables = 2 * 2 * 32000 * 1024
    assert planned["base"] == pytest.approx((kernels * (4 / 8 + 2 / 64) + tables) / 1e9, rel=1e-2)
    assert report["compiler_GB"]["arguments"] == pytest.approx(planned["base"], rel=0.05)


def test_decoding_against_transformers():
    pytest.importorskip("torch", reason="PyTorch is absent")
    report = run("decode", "--batch=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1")
    assert report["ours_tokens_per_second"] > 0 and report["transformers_tokens_per_second"] > 0


def test_fedrag_is_asked_for_where_it_is_absent():
    command = [sys.executable, "-m", "experiments.benchmarks.against_fedrag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "fedrag_requirements.txt" in done.stderr
