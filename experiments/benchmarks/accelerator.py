"""All benchmarks of an accelerator in one command of at most ten minutes.

    python -m experiments.benchmarks.accelerator
    python -m experiments.benchmarks.accelerator --only=round,search --seconds=300
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.accelerator --small

Each part is one benchmark in a separate process, so it starts with an empty device. Each part has a
share of the time; later parts get the time that earlier parts did not use. A part that fails or times
out is reported with the end of its output, and the others continue. The last part trains and tests one
cell of the real-text table; if it was interrupted before, it resumes (--runs). `--small` tries the
command with sizes that mean nothing. Prints a table, then a line of JSON.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags
from tabulate import tabulate

_SECONDS = flags.DEFINE_integer("seconds", 570, "for all parts together", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "names of parts; all unless given")
_SMALL = flags.DEFINE_bool("small", False, "sizes that mean nothing")
_RUNS = flags.DEFINE_string("runs", "runs/accelerator", "folder of the cell of real text")
_BENCHMARK = "experiments.benchmarks."


@dataclasses.dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
      share: share of the total time.
      command: module with its flags.
      small: flags that replace those with `--small`.
      told: function that selects the values of its report for the table.
    """

    name: str
    share: float
    command: tuple[str, ...]
    small: tuple[str, ...]
    told: Callable[[dict], Mapping[str, Any]]


def main(argv):
    del argv
    known = [part.name for part in PARTS]
    if unknown := {*_ONLY.value} - {*known}:
        raise app.UsageError(f"--only: unknown {sorted(unknown)}; choose among {known}")
    parts = [part for part in PARTS if not _ONLY.value or part.name in _ONLY.value]
    found, rows, end = {}, [], time.perf_counter() + _SECONDS.value
    for number, part in enumerate(parts):
        start = time.perf_counter()
        share = part.share / sum(p.share for p in parts[number:])
        seconds = max(share * (end - start), 1.0)
        print(f"{part.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        report, trouble = ran(part, seconds)
        found[part.name] = {"seconds": round(time.perf_counter() - start, 1)} | report
        if trouble:
            found[part.name]["trouble"] = trouble
        told = part.told(report) if report else {}
        rows += [(part.name, name, value) for name, value in told.items()]
        rows += [(part.name, "trouble", trouble.splitlines()[-1])] if trouble else []
        for row in rows[len(rows) - len(told) - bool(trouble) :]:
            print("  ".join(map(str, row)), file=sys.stderr, flush=True)
    print(tabulate(rows, ("part", "what", "is"), disable_numparse=True))
    failed = [name for name, report in found.items() if "trouble" in report]
    print(json.dumps({"failed": failed} | found))


def ran(part: Part, seconds: float) -> tuple[dict, str]:
    """Returns the report of a part, and the end of its output if it failed or was stopped."""
    module, *flagged = part.command
    own = [*(part.small if _SMALL.value else flagged)]
    own += [f"--runs={_runs()}"] if part.name == REAL else []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # to end it with all that it has started
    )
    trouble = ""
    try:
        out, said = process.communicate(timeout=seconds)
        if process.returncode:
            trouble = _last(said) or f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
        trouble = f"{_last(out + said)}\nstopped after {seconds:.0f} s"
    report = _cell() if part.name == REAL else _report(out)
    return report, trouble


def _report(out: str) -> dict:
    """Returns the last line that is JSON."""
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {}


def _last(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-3:])[-600:]


def _runs() -> pathlib.Path:
    return pathlib.Path(_RUNS.value) / ("small" if _SMALL.value else "full")


def _cell() -> dict:
    """Returns scores in percent and seconds of the finished cells."""
    import numpy as np

    report = {}
    for path in _runs().glob("*/cells/*/cell.json"):
        cost = json.loads(path.read_text())["cost"]
        with np.load(path.parent / "scores.npz", allow_pickle=False) as scores:
            means = {f"{m}_percent": 100 * float(np.nanmean(scores[m])) for m in ("em", "f1")}
        report[path.parent.name] = means | {"trained_seconds": cost["seconds"]}
    return report


def _rounds(report: dict) -> dict:
    """Returns client-steps per second for each number of clients."""
    told = {f"{n} clients, steps/s": s for n, s in report["client_steps_per_second"].items()}
    names = ("mfu", "fraction_of_product_peak", "product_tflops", "device_waits", "model")
    return told | {name: report[name] for name in names}


def _some(*names: str) -> Callable[[dict], dict]:
    return lambda report: {name: report[name] for name in names if name in report}


def _cells(report: dict) -> dict:
    told = ((name, what, value) for name, one in report.items() for what, value in one.items())
    return {f"{name}, {what}": round(value, 1) for name, what, value in told}


REAL = "real"
_TABLE = "experiments", "compare_strategies"
_ONE = (
    "--config.seeds=(0,)", "--config.regimes=('centralised',)", "--config.strategies=('generator',)",
    "--config.training.checkpoint_every=1",
)  # fmt: skip
PARTS = (
    Part(
        "round", 0.3,
        (_BENCHMARK + "gpu_round", "--clients=8,32", "--group_size=8", "--rounds=4"),
        ("--model=small", "--clients=1,2", "--tokens=32", "--group_size=1", "--rounds=2"),
        _rounds,
    ),
    Part(
        "embedding", 0.1,
        (_BENCHMARK + "embedding", "--texts=8192", "--repeats=3"),
        ("--model=builtin:encoder", "--texts=16", "--repeats=1"),
        _some("ours_texts_per_second", "fraction_of_peak", "vs_sentence_transformers"),
    ),
    Part(
        "decode", 0.1,
        (_BENCHMARK + "decode", "--model=smollm2", "--dtype=bfloat16", "--batch=64",
         "--prompt_tokens=448", "--repeats=3"),
        ("--dtype=bfloat16", "--batch=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1"),
        _some("ours_tokens_per_second", "batch", "prompt_tokens", "new_tokens"),
    ),
    Part(
        "search", 0.1,
        (_BENCHMARK + "search", "--repeats=3"),
        ("--sizes=40,300", "--batches=1,20", "--dimension=16", "--repeats=1"),
        _some("crossover", "device_ms", "faiss_ms"),
    ),
    Part(
        "sweep", 0.15,
        (_BENCHMARK + "sweep", "--rates=4", "--seeds=3", "--rounds=4"),
        ("--rates=2", "--seeds=1", "--rounds=1"),
        _some("cost_ratio", "cost_ratio_without_compiling", "fits"),
    ),
    Part(
        REAL, 0.25,
        (*_TABLE, "--config=configs/compare_real.py", *_ONE),
        (*_TABLE[1:], *_ONE, "--config.training.rounds=1", "--config.training.local_steps=1"),
        _cells,
    ),
)  # fmt: skip


if __name__ == "__main__":
    app.run(main)
