"""A grid of learning rates and seeds: all fits together, compared with one after the other.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.sweep
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.sweep --strategy=joint_token --rounds=4

The grid has nine rates and five seeds of a strategy of the comparison, centralised, on the built-in
world. One by one, each training makes its own task (retrieval, tables) and compiles only new programs.
Together, `strategies.together` and `tune_together` measure how to run them side by side. Each way has a
separate process, which starts with empty caches. Both must produce the same training losses. Seconds
include compilation; the report also gives them without it. Prints one line of JSON, last.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from experiments.launch import cores, virtual_devices

_STRATEGY = flags.DEFINE_string("strategy", "generator", "strategy of the comparison")
_RATES = flags.DEFINE_integer(
    "rates", 9, "number of learning rates in the grid from 1e-4 to 1e-2", lower_bound=1
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 5, "number of seeds of adapters and shuffling", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 8, "number of rounds, as config.training.rounds", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices", cores(), "number of virtual devices for both sides, on a CPU", lower_bound=1
)
_ONE = flags.DEFINE_string("only", None, "internal: run one side in this process")


def main(argv):
    del argv
    if _ONE.value:
        print(json.dumps(measured(_ONE.value == "together")))
        return
    found = {}
    for side in ("alone", "together"):
        names = ("strategy", "rates", "seeds", "rounds", "devices")
        same = [f"--{name}={flags.FLAGS[name].value}" for name in names]
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"FEDRAG_CACHE": folder}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            command = [sys.executable, "-m", "experiments.benchmarks.sweep", *same]
            done = subprocess.run(
                [*command, f"--only={side}"], capture_output=True, text=True, env=environment
            )
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side}: {found[side]['seconds']:.1f} s", flush=True)
    alone, together = found["alone"], found["together"]
    np.testing.assert_allclose(alone["losses"], together["losses"], rtol=1e-3)
    report = {
        "cost_ratio": together["seconds"] / alone["seconds"],
        "cost_ratio_without_compiling": (together["seconds"] - together["compile_seconds"])
        / (alone["seconds"] - alone["compile_seconds"]),
    }
    report = {name: round(value, 3) for name, value in report.items()}
    for side in found.values():
        del side["losses"]
    report |= {"fits": _RATES.value * _SEEDS.value, "strategy": _STRATEGY.value} | found
    print(json.dumps(report))


def measured(together: bool) -> dict:
    """Trains all; seconds, and the training losses of the last round."""
    virtual_devices(_DEVICES.value)
    import dataclasses

    import jax

    from configs.compare_strategies import get_config
    from experiments.compare_strategies import Lab
    from experiments.loading import load_data
    from fedrag_jax.clock import Clock
    from fedrag_jax.strategies import strategies
    from fedrag_jax.strategies.strategy import tune_systems
    from fedrag_jax.strategies.tuner import tune_together

    config = get_config()
    config.training.rounds = _ROUNDS.value
    strategy = strategies.STRATEGIES[_STRATEGY.value]
    with tempfile.TemporaryDirectory() as folder:
        run = Lab(config, load_data(config), pathlib.Path(folder))
        tuners, systems = [], []
        for seed in range(_SEEDS.value):
            for rate in np.logspace(-4, -2, _RATES.value):
                tuner = run.tuner(lambda *_, rate=rate: rate, "centralised", seed, seed)
                where = pathlib.Path(folder) / f"{seed}-{rate:g}"
                tuners.append(dataclasses.replace(tuner, folder=where))
                systems.append(run.system(seed))
        clock, start = Clock(), time.perf_counter()
        if together:
            tune_systems(
                strategy,
                systems,
                run.dataset,
                lambda asked: tune_together([(tuners[i], task) for i, task in asked]),
            )
        else:
            for system, tuner in zip(systems, tuners, strict=True):
                strategy(system, run.dataset, tuner)
        seconds = time.perf_counter() - start
        ends = [
            f.read_text().splitlines()[-1]
            for t in tuners
            for f in sorted(t.folder.glob("*/rounds.jsonl"))
        ]
    return {
        "seconds": round(seconds, 2),
        "compile_seconds": round(clock.lap().compiling, 2),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "losses": [json.loads(end)["loss"] for end in ends],
    }


if __name__ == "__main__":
    app.run(main)
