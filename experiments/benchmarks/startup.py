"""Seconds from the command to the first training round, and to the help.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.startup

The command is the main comparison with federated tuning of the generator first. A cold run starts with
empty caches: nothing is compiled or embedded. A warm run uses the caches of the cold run before it.
Reports the median of a few pairs, each with separate caches; prints a line of JSON last.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "number of pairs of a cold and a warm start", lower_bound=1
)

COMPARE = [sys.executable, "-m", "experiments", "compare_strategies"]
TRAIN = [
    *COMPARE,
    "--config=configs/compare_strategies.py",
    "--config.strategies=('generator',)",
    "--config.regimes=('federated',)",
    "--config.wandb.mode=disabled",
]


def main(argv):
    del argv
    found = {"cold_s": [], "warm_s": [], "help_s": []}
    for _ in range(_REPEATS.value):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold_s", "warm_s"):
                found[name].append(first_round(pathlib.Path(folder), name))
        start = time.perf_counter()
        subprocess.run([*COMPARE, "--help"], stdout=subprocess.DEVNULL)
        found["help_s"].append(time.perf_counter() - start)
        print({name: round(seconds[-1], 2) for name, seconds in found.items()})
    print(json.dumps({name: round(statistics.median(s), 2) for name, s in found.items()}))


def first_round(folder: pathlib.Path, name: str) -> float:
    """Returns the seconds until the line about the first round; the process is then stopped."""
    environment = os.environ | {
        "FEDRAG_CACHE": str(folder / "embeddings"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    start = time.perf_counter()
    command = [*TRAIN, f"--config.name={name}", f"--runs={folder}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if ": round 1/" in line:
            seconds = time.perf_counter() - start
            process.kill()
            process.wait()
            return seconds
    raise SystemExit(f"no round was trained: {''.join(said[-20:])}")


if __name__ == "__main__":
    app.run(main)
