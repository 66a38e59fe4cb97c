"""Compiles the programs of an experiment for TPUs, without a TPU: memory, communication, time bounds.

    pip install -e '.[tpu]'
    python -m experiments.benchmarks.compile_for --topology=v5e:2x4
    python -m experiments.benchmarks.compile_for --topology=v5p:2x2x1 --config=configs/research.py:real
    python -m experiments.benchmarks.compile_for --topology=v5e:2x4 --programs=round \
        --prompt_tokens=1024 --config.models.generator=FOLDER --config.models.dtype=bfloat16 \
        --config.models.devices=8

The rounds are those that the experiment's own `fit` requests, one for each strategy in each regime;
equal rounds are compiled once. No weights are loaded: only `config.json` of the models is read, and
only the lengths of questions and passages matter. Passages are not embedded, so the passages found for
a question are arbitrary. A generator without a tokenizer uses the built-in one.

The compiler of `libtpu` reports the memory of a chip and the communication between chips. Operations
are counted over all matrix products, and bytes over all arrays read and written; loops count as often
as they run. The time is the longer of operations at the chip's published peak and bytes at its
bandwidth: a bound, not a measurement. Prints a table, then a line of JSON.
"""

import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from tabulate import tabulate

from experiments.benchmarks.topology import EXAMPLES, devices_of
from experiments.launch import launch
from fedrag_jax.errors import ConfigError

PROGRAMS = ("round", "embedding", "prefill", "decode", "evaluation")

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", f"topology of the chips, such as {EXAMPLES}")
_PROGRAMS = flags.DEFINE_list("programs", list(PROGRAMS), "programs to compile")
_PROMPT = flags.DEFINE_integer(
    "prompt_tokens",
    0,
    "tokens of the generator's prompts with answers; 0 uses the width that the data needs",
)


def main(config, runs: str) -> None:
    """Compiles the programs and prints their reports; writes nothing to `runs`."""
    if unknown := {*_PROGRAMS.value} - {*PROGRAMS}:
        raise ConfigError(f"--programs: unknown {sorted(unknown)}; choose among {[*PROGRAMS]}")
    import jax

    from experiments.benchmarks.chips import chip_of

    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # which reads no program of another device
    devices = devices_of(_TOPOLOGY.value)
    chip = chip_of(devices[0].device_kind)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for report in all_reports(config, pathlib.Path(folder), devices, chip):
            reports.append(report)
            say(f"{report.name}: compiled in {report.compile_seconds:.0f} s")
    print(table(reports))
    print(json.dumps(summary(reports) | {"topology": _TOPOLOGY.value}))


def all_reports(config, folder: pathlib.Path, devices: Sequence, chip) -> Iterator:
    """Yields the report of each program."""
    from experiments.benchmarks.compiling import compiled
    from experiments.benchmarks.described_lab import DescribedLab
    from experiments.loading import check, load_data

    check(config)
    lab = DescribedLab(config, load_data(config), folder, devices)
    wanted = {*_PROGRAMS.value}
    if "round" in wanted:
        for one in lab.rounds(_PROMPT.value):
            say(f"{one.name}: traced, {one.chips} chips")
            about = {"steps": one.steps, "useful": one.useful}
            yield compiled(one.name, one.traced, chip, one.chips, **about)[0]
    if "embedding" in wanted:
        yield compiled("embedding", lab.embedding(), chip, 1)[0]
    if wanted & {"prefill", "decode"}:
        report, program = compiled("prefill", lab.prefill(_PROMPT.value), chip, lab.cut)
        yield from [report] if "prefill" in wanted else []
        if "decode" in wanted and program is not None:
            traced = lab.decode(program, _PROMPT.value)
            yield compiled("decode, a token", traced, chip, lab.cut)[0]
    if "evaluation" in wanted:
        yield compiled("evaluation", lab.likelihoods(_PROMPT.value), chip, lab.cut)[0]


def table(reports: Sequence) -> str:
    """A row for each program, of what one chip does."""
    head = (
        "program", "fits", "GB: arguments", "results", "scratch", "at once", "of", "compiled in s",
        "TFLOP", "GB moved", "ms at least", "bound by", "MFU at most", "collectives: MB",
    )  # fmt: skip
    rows = []
    for r in reports:
        sent = ", ".join(f"{n.count} {kind}: {n.bytes / 1e6:.3g}" for kind, n in r.sent.items())
        sizes = (
            [f"{x / 1e9:.3f}" for x in (r.arguments, r.results, r.scratch)] if r.fits else [""] * 3
        )
        rows.append((
            r.name, "yes" if r.fits else "NO", *sizes, f"{r.peak / 1e9:.3f}",
            f"{r.chip.memory / 1e9:.0f}", f"{r.compile_seconds:.1f}", f"{r.operations / 1e12:.4g}",
            f"{r.moved / 1e9:.4g}" if r.fits else "", f"{1e3 * r.seconds:.4g}" if r.fits else "",
            r.bound if r.fits else "", "" if r.mfu is None else f"{r.mfu:.2f}", sent,
        ))  # fmt: skip
    return tabulate(rows, head, disable_numparse=True)


def summary(reports: Sequence) -> dict[str, Any]:
    """Returns the deciding numbers, and the report of each program."""
    from dataclasses import asdict

    programs = []
    for r in reports:
        about = {k: v for k, v in asdict(r).items() if k != "chip"}
        about["sent"] = {kind: sent._asdict() for kind, sent in r.sent.items()}
        programs.append(about | {"seconds_at_least": r.seconds, "bound": r.bound, "mfu": r.mfu})
    mfus = [r.mfu for r in reports if r.mfu is not None]
    return {
        "fits": all(r.fits for r in reports),
        "peak_gb": round(max((r.peak for r in reports), default=0) / 1e9, 3),
        "all_gathers": sum(r.all_gathers() for r in reports),
        "roofline_mfu": round(min(mfus), 3) if mfus else None,
        "programs": programs,
    }


def say(what: str, start: float = time.perf_counter()) -> None:
    """Tells on standard error what is being done."""
    print(f"{time.perf_counter() - start:6.0f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # where nothing is computed
    launch(main, "configs/compare_strategies.py")
