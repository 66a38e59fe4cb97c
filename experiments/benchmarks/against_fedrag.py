"""Federated tuning of a retriever: time per client-step, compared with FedRAG (`fed-rag`) on a CPU.

    python -m venv FOLDER
    FOLDER/bin/pip install -r experiments/benchmarks/fedrag_requirements.txt
    FOLDER/bin/pip uninstall -y torchvision    # not used; that of another build of torch does not load
    python -m experiments.benchmarks.against_fedrag --fedrag_python=FOLDER/bin/python
    python -m experiments.benchmarks.against_fedrag --fedrag_python=FOLDER/bin/python --model=minilm

Both tune a query encoder by federated averaging, with in-batch negatives and frozen passage vectors, in
float32 without dropout. AdamW has no decay and no clipping and starts fresh for each client and round.
Model, questions and clients are the same; each side shuffles separately. All questions are cut to the
length of the shortest one, so that there is no padding.

FedRAG's clients run in two ways: under Flower's simulation engine on Ray, and in one process, one after
the other, aggregated by Flower's `aggregate`. Their training function is written as in FedRAG's
examples (`trainer`, with the Trainer of sentence-transformers) or as an expert would write it (`loop`,
in plain PyTorch). `plain` is this loop without FedRAG and Flower: the difference between `plain` and
ours is arithmetic, the rest is the framework. Our clients are distributed over virtual devices. PyTorch
uses one thread or all, whichever makes `plain` faster; workers of a simulation have their own threads.

Each turn is a separate process, which waits until the machine is idle; all variants take turns.
`ms_per_client_step` is the median over turns of the median round. The first round is not counted,
because it compiles or starts Ray's workers. `end_to_end_seconds` is the time of the whole process: it
includes imports, loading, compilation and the first round, but not the check of the loss.
`vs_simulation` and `vs_in_process` compare with the faster of FedRAG's two training functions,
`..._trainer` with the one of its examples. All variants must start from the same loss and lower it;
otherwise nothing is reported. Prints one line of JSON, last.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from experiments.launch import cores, virtual_devices

ROOT = pathlib.Path(__file__).parents[2]
THEIRS = "from experiments.benchmarks.fedrag_side import main; main()"  # workers import it by name
RUNS = ("ours", "plain", "in_process/loop", "in_process/trainer", "simulation/loop",
        "simulation/trainer")  # fmt: skip

_PYTHON = flags.DEFINE_string("fedrag_python", "", "Python interpreter of FedRAG's environment")
_MODEL = flags.DEFINE_string(
    "model", "builtin:encoder", "encoder: builtin:encoder, minilm, or a folder"
)
_DATA = flags.DEFINE_string("data", "squad", "data set, by name or folder")
_TOKENS = flags.DEFINE_integer("tokens", 16, "tokens per question; shorter questions are left out")
_CLIENTS = flags.DEFINE_integer(
    "clients", 8, "number of clients; all take part in every round", lower_bound=1
)
_EXAMPLES = flags.DEFINE_integer(
    "examples_per_client", 64, "number of questions per client", lower_bound=1
)
_STEPS = flags.DEFINE_integer("local_steps", 5, "steps per client and round", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 8, "number of questions per step", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 4, "rounds per turn; the median leaves out the first", 2)
_GROUP = flags.DEFINE_integer(
    "group_size", 1, "clients trained side by side (ours only)", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    2,
    "number of virtual devices over which the clients are distributed (ours only)",
    lower_bound=1,
)
_UNROLL = flags.DEFINE_bool(
    "unroll",
    None,
    "unroll layers (ours only); default: unroll networks with few layers (`Network.written_out`)",
)
_CPUS = flags.DEFINE_integer("cpus_per_client", 1, "CPUs per simulated client", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "number of turns per side", lower_bound=1)
_WAIT = flags.DEFINE_integer(
    "wait_seconds", 30, "maximum seconds to wait for an idle machine before a turn"
)
_TURN = flags.DEFINE_string("turn_of_ours", "", "internal: run one turn of ours in this folder")

SCALE, LEARNING_RATE = 20.0, 1e-4


def main(argv):
    del argv
    if _TURN.value:
        print(json.dumps(ours(_TURN.value)))
        return
    python = _PYTHON.value
    if not python or not pathlib.Path(python).exists():
        raise SystemExit(
            "--fedrag_python is to be the python of an environment with FedRAG, which cannot share "
            "this one; make it so:\n"
            "    python -m venv FOLDER\n"
            "    FOLDER/bin/pip install -r experiments/benchmarks/fedrag_requirements.txt\n"
            "    FOLDER/bin/pip uninstall -y torchvision\n"
            "and call this with --fedrag_python=FOLDER/bin/python"
        )
    if _STEPS.value * _BATCH.value > _EXAMPLES.value:
        raise SystemExit("a round needs local_steps x batch_size different questions of a client")
    turns = {name: [] for name in RUNS}
    waited = 0.0
    with tempfile.TemporaryDirectory() as folder:
        prepare(pathlib.Path(folder))
        threads = min((1, cores()), key=lambda n: steady(turn(folder, "plain", n)))
        for number in range(_REPEATS.value):
            for name in RUNS:
                waited += wait(_WAIT.value)
                turns[name].append(turn(folder, name, threads))
                print(f"{number + 1}/{_REPEATS.value} {name}: {steady(turns[name][-1]):.1f} ms, "
                      f"{turns[name][-1]['seconds']:.1f} s in all", flush=True)  # fmt: skip
    check(turns)
    report(turns, waited, threads)


def prepare(folder: pathlib.Path) -> None:
    """Writes the model, the questions, and vectors of their gold passages, a passage a question."""
    import numpy as np

    from fedrag_jax.data import datasets
    from fedrag_jax.models import hub
    from fedrag_jax.retrieval.retriever import Retriever

    model, dataset = hub.load(_MODEL.value), datasets.load(_DATA.value)
    hub.save(model, folder / "model")
    # The name of a class that only newer versions of transformers have.
    about = json.loads((folder / "model/tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "model/tokenizer_config.json").write_text(json.dumps(about))

    chosen, count = {}, _CLIENTS.value * _EXAMPLES.value
    for example in dataset.train:
        long = len(model.tokenizer(example.question)["input_ids"]) >= _TOKENS.value
        if long and example.positive_ids and len(chosen) < count:
            chosen.setdefault(example.positive_ids[0], example.question)
    if len(chosen) < count:
        raise SystemExit(f"{_DATA.value} has {len(chosen)} such questions, {count} are needed")
    passages = {passage.id: passage for passage in dataset.passages}
    retriever = Retriever.build(model, [passages[i] for i in chosen])
    np.save(folder / "documents.npy", retriever.vectors)
    work = {flag.name: flag.value for flag in (_TOKENS, _CLIENTS, _EXAMPLES, _STEPS, _BATCH)}
    work |= {flag.name: flag.value for flag in (_ROUNDS, _GROUP, _DEVICES, _UNROLL, _CPUS)}
    work |= {"scale": SCALE, "learning_rate": LEARNING_RATE, "probe": _EXAMPLES.value}
    (folder / "work.json").write_text(json.dumps(work | {"questions": list(chosen.values())}))


def ours(folder: str) -> dict:
    """Runs one turn of this project, in a separate process."""
    work = json.loads(pathlib.Path(folder, "work.json").read_text())
    virtual_devices(work["devices"])
    import jax
    import numpy as np
    import optax

    from fedrag_jax.data.examples import Dataset, Example, Passage
    from fedrag_jax.data.partition import Partition
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.callbacks import Callback
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.federated.optimizers import tunable
    from fedrag_jax.models import hub
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking
    from fedrag_jax.retrieval.retriever import Retriever

    model = hub.load(f"{folder}/model")
    unroll = work["unroll"]
    if unroll is None:
        unroll = model.network.written_out().config.unroll
    config = dataclasses.replace(model.network.config, unroll=unroll)
    examples = [Example(f"q{i}", q, ("",), (f"p{i}",)) for i, q in enumerate(work["questions"])]
    passages = [Passage(f"p{i}", "", "") for i in range(len(examples))]  # their vectors are there
    network = dataclasses.replace(model.network, config=config)
    vectors = np.load(f"{folder}/documents.npy", allow_pickle=False)
    both = model.params, model.params
    task = multiple_negatives_ranking(
        Retriever(network, model.tokenizer, *both, passages, vectors, vectors, None),
        Dataset("work", passages, examples, [], []),
        score_scale=work["scale"],
        max_question_tokens=work["tokens"],
    )
    clients = np.arange(len(examples)).reshape(work["clients"], -1)

    ends = []

    class Stamps(Callback):
        def round_end(self, state, record):
            ends.append(time.perf_counter())

    def probe(trainable):
        table = task.collate(examples[: work["probe"]], None)
        batch = table | {"weight": np.ones(work["probe"], np.float32)}
        return float(jax.jit(task.loss)(trainable, task.frozen, batch, jax.random.key(0))[0])

    clock = time.perf_counter()
    first = probe(task.trainable)
    aside = time.perf_counter() - clock
    result = fit(
        task,
        Partition(examples, tuple(clients)),
        fed_avg(local_steps=work["local_steps"]),
        rounds=work["rounds"],
        batch_size=work["batch_size"],
        group_size=work["group_size"],
        mesh=jax.make_mesh((work["devices"],), ("clients",)) if work["devices"] > 1 else None,
        optimizer=tunable(optax.adamw, learning_rate=work["learning_rate"], weight_decay=0.0),
        callbacks=[Stamps()],
    )
    jax.block_until_ready(result.trainable)
    clock = time.perf_counter()
    moved = jax.tree.map(lambda x, y: abs(x - y).max(), result.trainable, task.trainable)
    return {
        "round_seconds": np.diff(ends).tolist(),
        "first_loss": first,
        "last_loss": probe(result.trainable),
        "moved": float(max(jax.tree.leaves(moved))),
        "versions": {"jax": jax.__version__},
        "aside_seconds": aside + time.perf_counter() - clock,
    }


def turn(folder: str, name: str, threads: int) -> dict:
    """Runs one process to its end; returns what it printed, and its `seconds`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    run, _, trainer = name.partition("/")
    command = [_PYTHON.value, "-c", THEIRS, folder, run, trainer]
    if run == "ours":
        module = "experiments.benchmarks.against_fedrag"
        command = [sys.executable, "-m", module, f"--turn_of_ours={folder}"]
    elif run != "simulation":
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"seconds": seconds - found["aside_seconds"]}


def wait(limit: float) -> float:
    """Seconds until others left nine tenths of the machine alone, at most `limit`."""
    start = time.perf_counter()

    def idle_and_all():
        numbers = [
            int(x) for x in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        ]
        return numbers[3] + numbers[4], sum(numbers)

    while time.perf_counter() - start < limit:
        idle, total = idle_and_all()
        time.sleep(2)
        now_idle, now_total = idle_and_all()
        if now_idle - idle > 0.9 * (now_total - total):
            break
    return time.perf_counter() - start


def steady(found: dict) -> float:
    """Returns milliseconds per client-step."""
    per_round = statistics.median(found["round_seconds"])
    return 1000 * per_round / (_CLIENTS.value * _STEPS.value)


def check(turns: dict) -> None:
    """Raises an error if the variants did different work, or did not train."""
    start = turns["ours"][0]["first_loss"]
    for name, found in turns.items():
        for f in found:
            if not math.isclose(f["first_loss"], start, rel_tol=1e-3):
                raise SystemExit(f"{name} starts from loss {f['first_loss']}, ours from {start}")
            if not (f["moved"] > 0 and f["last_loss"] < f["first_loss"]):
                raise SystemExit(f"{name} did not train: {f}")


def report(turns: dict, waited: float, threads: int) -> None:
    """Prints the line of JSON."""
    ms = {name: statistics.median(map(steady, found)) for name, found in turns.items()}
    spread = {
        name: [round(f(map(steady, found)), 2) for f in (min, max)] for name, found in turns.items()
    }
    end = {name: statistics.median(f["seconds"] for f in found) for name, found in turns.items()}

    def against(run, values=ms, trainers=("loop", "trainer")):
        return round(min(values[f"{run}/{t}"] for t in trainers) / values["ours"], 2)

    last = {name: found[-1] for name, found in turns.items()}
    summary = {
        "vs_simulation": against("simulation"),
        "vs_in_process": against("in_process"),
        "vs_simulation_trainer": against("simulation", trainers=("trainer",)),
        "vs_in_process_trainer": against("in_process", trainers=("trainer",)),
        "vs_plain": round(ms["plain"] / ms["ours"], 2),
        "ms_per_client_step": {name: round(value, 2) for name, value in ms.items()},
        "from_to": spread,
        "end_to_end_vs_simulation": against("simulation", end),
        "end_to_end_vs_in_process": against("in_process", end),
        "end_to_end_seconds": {name: round(value, 1) for name, value in end.items()},
        "loss": {n: [round(f["first_loss"], 4), round(f["last_loss"], 4)] for n, f in last.items()},
    }
    flags_shown = (_MODEL, _TOKENS, _CLIENTS, _STEPS, _BATCH, _ROUNDS, _GROUP, _CPUS, _REPEATS)
    summary |= {flag.name: flag.value for flag in flags_shown}
    summary |= {
        "device": f"{cores()} CPU cores",
        "torch_threads": threads,
        "waited_seconds": round(waited),
        "load": round(os.getloadavg()[2], 1),
        "versions": last["ours"]["versions"] | last["plain"]["versions"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    app.run(main)
