"""Peak memory of the two sides that `federated_round` compares, each in a separate process.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.round_memory --model=smollm2 --clients=2

Takes the flags of `federated_round`. PyTorch runs eagerly with each way to write adapters; the smallest
peak counts. A process loads the decoder, trains the clients twice and reports its peak memory. Prints a
line for each process, then a line of JSON; GB are 1e9 bytes.
"""

import importlib.util
import json
import multiprocessing
import pathlib
import sys
import tempfile

from absl import app, flags

from experiments.benchmarks import federated_round
from experiments.benchmarks.federated_round import (
    ADAMW,
    answer,
    batches,
    clients,
    decoder,
    ours,
    say,
)
from experiments.benchmarks.process_memory import peak
from experiments.launch import virtual_devices

KINDS = "full", "answers"
TWICE = 2  # the first time compiles


def main(argv):
    del argv  # what is left of it without flags
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None:
        raise SystemExit(
            "this compares with PyTorch, which is not here: pip install torch==2.13.0 peft==0.21.2"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        layers, vocabulary = alone(saved, folder)
        found = {}
        for kind in KINDS:
            found[f"ours_{kind}"] = alone(of_ours, kind)
            ways = {way: alone(of_pytorch, kind, way, folder, vocabulary) for way in layers}
            found[f"pytorch_{kind}"] = min(ways.values())
            for way, size in {"ours": found[f"ours_{kind}"], **ways}.items():
                print(f"{kind}, {way}: {size / 1e9:.2f} GB", flush=True)
    sizes = {name: round(size / 1e9, 3) for name, size in found.items()}
    ratios = {
        f"vs_pytorch_{k}": round(found[f"ours_{k}"] / found[f"pytorch_{k}"], 3) for k in KINDS
    }
    print(json.dumps({"clients": max(clients()), "peak_GB": sizes, **ratios}))


def alone(function, *args):
    """Returns the result of a function, run in a separate process."""
    say(" ".join([function.__name__, *(str(a) for a in args if isinstance(a, str))]))
    with multiprocessing.get_context("spawn").Pool(1, _with_flags, (sys.argv,)) as pool:
        return pool.apply(function, args)


def _with_flags(argv) -> None:
    flags.FLAGS(argv)


def saved(folder: pathlib.Path) -> tuple[tuple[str, ...], int]:
    """Writes the decoder and its adapters for PyTorch; its ways, and the size of the vocabulary."""
    from experiments.benchmarks import torch_round

    network, params, adapters = decoder()
    federated_round.save(network, params, adapters, folder)
    return torch_round.LAYERS, network.config.vocab_size


def of_ours(kind: str) -> int:
    """Bytes at most."""
    virtual_devices(federated_round.devices())
    network, params, adapters = decoder()
    run = ours(network, params, adapters, answers_only=kind == "answers")
    tokens = batches(max(clients()), network.config.vocab_size)
    for _ in range(TWICE):
        run(tokens)
    return peak()


def of_pytorch(kind: str, layer: str, folder: pathlib.Path, vocabulary: int) -> int:
    """Bytes at most."""
    from experiments.benchmarks import torch_round

    run = torch_round.Round(
        layer,
        None,
        folder / "decoder",
        folder / "adapters",
        scored=kind == "answers",
        answer=answer(),
        **ADAMW,
    )
    for _ in range(TWICE):
        run(batches(max(clients()), vocabulary))
    return peak()


if __name__ == "__main__":
    app.run(main)
