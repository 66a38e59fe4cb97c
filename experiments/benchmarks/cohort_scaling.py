"""Memory and time of a round for growing cohorts from a population of ten thousand clients.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.cohort_scaling
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.cohort_scaling --algorithm=scaffold

Each cohort size runs in a separate process, which reports its peak memory at the end. Adapters of the
built-in decoder are trained on random prompts, two examples per client. The first round (compilation)
is not timed; the time is the median of the others. The state of the population is stored on the host,
has the same size for every cohort, and is reported separately. Draws a plot; prints a line of
JSON last.
"""

import json
import pathlib
import statistics
import subprocess
import sys

from absl import app, flags

from experiments.benchmarks.process_memory import peak

_ALGORITHM = flags.DEFINE_enum(
    "algorithm", "fed_avg", ["fed_avg", "scaffold", "local_only"], "federated algorithm"
)
_COHORTS = flags.DEFINE_list(
    "cohorts", ["1", "4", "16", "64", "256", "1024"], "cohort sizes to measure, in clients"
)
_CLIENTS = flags.DEFINE_integer(
    "clients", 10_000, "number of clients in the population", lower_bound=1
)
_GROUP = flags.DEFINE_integer("group_size", 1, "clients trained side by side", lower_bound=1)
_STEPS = flags.DEFINE_integer("local_steps", 1, "steps per client and round", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "tokens of a prompt with its answer", lower_bound=17)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 4, "number of rounds; the first is not timed", lower_bound=2
)
_PLOT = flags.DEFINE_string("plot", "docs/cohort_scaling.png", "file of the figure, or empty")
_ONE = flags.DEFINE_integer("one", None, "measure only this cohort size, in this process")


def main(argv):
    del argv
    if _ONE.value is not None:
        print(json.dumps(measured(_ONE.value)))
        return
    found = {}
    for cohort in map(int, _COHORTS.value):
        names = ("algorithm", "clients", "group_size", "local_steps", "tokens", "rounds")
        same = [f"--{name}={flags.FLAGS[name].value}" for name in names]
        command = [sys.executable, "-m", "experiments.benchmarks.cohort_scaling", *same]
        done = subprocess.run([*command, f"--one={cohort}"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"cohort {cohort}: {done.stderr[-2000:]}")
        found[cohort] = json.loads(done.stdout.splitlines()[-1])
        print("cohort {:5d}: {rss_mb:7.1f} MB, {ms_per_client:7.2f} ms a client".format(
            cohort, **found[cohort]
        ))  # fmt: skip
    if _PLOT.value:
        draw(found, pathlib.Path(_PLOT.value))
    report = {
        name: {str(cohort): x[name] for cohort, x in found.items()}
        for name in ("rss_mb", "ms_per_client")
    }
    last = found[max(found)]
    report |= {name: last[name] for name in ("population_mb", "device")}
    report |= {"algorithm": _ALGORITHM.value, "group_size": _GROUP.value}
    print(json.dumps(report))


def measured(cohort: int) -> dict:
    """Returns the peak memory of this process after a few rounds, and milliseconds per client."""
    import jax
    import numpy as np
    import optax

    from fedrag_jax.data.partition import partition
    from fedrag_jax.data.schemes import iid
    from fedrag_jax.federated.algorithm import nbytes
    from fedrag_jax.federated.callbacks import Callback
    from fedrag_jax.federated.fit import fit

    task, examples = random_prompts(2 * _CLIENTS.value)
    clients = partition(examples, iid(_CLIENTS.value))

    class Population(Callback):
        def round_end(self, state, record):
            self.bytes = nbytes(state.state.population)

    keep = Population()
    sgd = _ALGORITHM.value == "scaffold"
    result = fit(
        task,
        clients,
        algorithm(cohort),
        rounds=_ROUNDS.value,
        batch_size=2,
        optimizer=None if sgd else optax.adamw(1e-4),
        group_size=_GROUP.value,
        callbacks=[keep],
    )
    seconds = [record["seconds"] for record in result.history[1:]]
    assert all(len(record["clients"]) == cohort for record in result.history)
    assert np.isfinite(result.history[-1]["loss"])
    return {
        "rss_mb": round(peak() / 1e6, 1),
        "ms_per_client": round(1000 * statistics.median(seconds) / cohort, 3),
        "population_mb": round(keep.bytes / 1e6, 1),
        "device": jax.devices()[0].device_kind,
    }


def algorithm(cohort: int):
    """Returns the algorithm of the flag, with this number of clients per round."""
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.algorithms.local_only import local_only
    from fedrag_jax.federated.algorithms.scaffold import scaffold
    from fedrag_jax.federated.sampling import uniform

    work = {"local_steps": _STEPS.value, "sampling": uniform(cohort)}
    if _ALGORITHM.value == "scaffold":
        return scaffold(1e-3, **work)
    return {"fed_avg": fed_avg, "local_only": local_only}[_ALGORITHM.value](**work)


def random_prompts(count: int):
    """Returns a task over adapters of the built-in decoder, and the token ids of random prompts."""
    import numpy as np

    from fedrag_jax.data.batching import ANSWER_TOKENS
    from fedrag_jax.models import hub, lora
    from fedrag_jax.objectives.generator import AnswerLoss
    from fedrag_jax.objectives.task import Task

    model = hub.load("builtin:decoder")
    network = lora.add_lora(model.network, lora.LoraConfig(8, 16.0))
    tokens, answer = _TOKENS.value, ANSWER_TOKENS
    rng = np.random.default_rng(0)
    table = {
        "tokens": rng.integers(0, network.config.vocab_size, (count, 1, tokens), dtype=np.int32),
        "lengths": np.full((count, 1), tokens, np.int32),
        "answer_positions": np.tile(
            np.arange(tokens - answer, tokens, dtype=np.int32), (count, 1, 1)
        ),
        "answer_mask": np.ones((count, answer), np.float32),
    }
    task = Task(
        "random prompts",
        {"adapters": lora.init_adapters(network, 0)},
        {"decoder": model.params},
        AnswerLoss(network),
        lambda examples, _: {name: column[examples] for name, column in table.items()},
    )
    return task, np.arange(count)


def draw(found: dict, path: pathlib.Path) -> None:
    """Two panels over the cohort: memory and time."""
    from experiments.reporting.figures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
    panels = ("rss_mb", "peak memory (MB)"), ("ms_per_client", "time per client (ms)")
    for axis, (name, label) in zip(axes, panels, strict=True):
        axis.plot(list(found), [x[name] for x in found.values()], "o-", color="#0072B2")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), [str(cohort) for cohort in found])
        axis.minorticks_off()
        axis.set_ylim(0, 1.15 * max(x[name] for x in found.values()))
        axis.set_xlabel("clients per round")
        axis.set_ylabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    app.run(main)
