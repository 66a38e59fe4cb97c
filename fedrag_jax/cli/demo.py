"""Fine-tune the built-in system on the built-in world, centralised and federated; print a table.

2,000 passages about invented people and works, 1,600 questions to train on, 600 to test with. Eight
clients hold questions about different topics. Nothing is downloaded. The demo takes about two
minutes on two CPU cores; compiled programs are kept for the next run.

The full comparison has more strategies, regimes and seeds: run `make compare` in the repository.
"""

import argparse
import pathlib
import time
from typing import Any

import numpy as np

from fedrag_jax.cli.common import add_json, print_json

CLIENTS, ROUNDS, LOCAL_STEPS, BATCH_SIZE = 8, 4, 3, 4
# Rates of the first round, chosen on validation questions for these models and number of clients, as in
# configs/compare_strategies.py.
RATES = {
    "centralised": {"query": 4e-4, "adapters": 8e-4},
    "federated": {"query": 3.2e-3, "adapters": 6.4e-3},
}
METRICS = {"em": "exact match", "f1": "F1", "recall_at_5": "Recall@5"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag demo`."""
    parser.add_argument(
        "--strategy",
        choices=("retriever", "generator", "independent"),
        default="independent",
        help="part to tune: the retriever's query encoder, the generator's adapters, or both "
        "separately (default: independent, which is both)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.1,
        help="concentration of the Dirichlet split over topics; inf is an even split (default: 0.1)",
    )
    parser.add_argument("--questions", type=int, help="number of test questions (default: all 600)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--to", type=pathlib.Path, help="folder to save the federated system in")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag demo`: trains twice and tests three systems."""
    from fedrag_jax import files
    from fedrag_jax.data import synthetic
    from fedrag_jax.data.examples import clusters
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.evaluation.evaluator import evaluate
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.rag_folder import require_new
    from fedrag_jax.strategies import regimes
    from fedrag_jax.strategies.strategies import STRATEGIES
    from fedrag_jax.tracking.logs import Progress

    if args.questions is not None and args.questions < 2:
        raise ConfigError(f"--questions must be at least 2, got {args.questions}")
    if args.to is not None:
        require_new(args.to)
    world = synthetic.generate()
    asked = world.test[: args.questions]
    clients = regimes.split_clients(world.train, CLIENTS, args.alpha, "topic", args.seed)
    if args.to is not None:
        files.hold(args.to)  # a folder that cannot be made is refused before the training
    budget = regimes.Budget(ROUNDS, LOCAL_STEPS, CLIENTS, BATCH_SIZE, devices=0)
    system = RAGSystem.build(
        world.passages, world.train, score_scale=10.0, seed=args.seed, progress=True
    )

    def tuned(regime: str) -> RAGSystem:
        def tune(task):
            how = regimes.arguments(
                task, regime, world.train, clients, budget, RATES[regime], args.seed,
                callbacks=[Progress(regime)],
            )  # fmt: skip
            return fit(**how).trainable

        return STRATEGIES[args.strategy](system, world, tune)

    systems, scores, seconds = {}, {}, {}
    for name in ("untuned", "centralised", "federated"):
        start = time.perf_counter()
        systems[name] = system if name == "untuned" else tuned(name)
        seconds[name] = time.perf_counter() - start
        scores[name] = evaluate(systems[name], asked)
    together = clusters([e.positive_ids for e in asked], world.passages)
    rows = _rows(scores, together)
    if args.to is not None:
        systems["federated"].save(args.to)
    if args.json:
        print_json(
            {
                "strategy": args.strategy,
                "questions": len(asked),
                "rows": rows,
                "training_seconds": {name: round(spent, 3) for name, spent in seconds.items()},
            }
        )
    else:
        _print(args, rows, seconds, asked)
    return 0


def _rows(scores: dict[str, dict[str, np.ndarray]], together: np.ndarray) -> dict[str, Any]:
    """Returns the mean and 95% interval, in percent, of every system and of federation's effect."""
    from fedrag_jax.evaluation.significance import bootstrap_interval

    shown = {name: {m: found[m] for m in METRICS} for name, found in scores.items()}
    shown["federated - centralised"] = {
        m: scores["federated"][m] - scores["centralised"][m] for m in METRICS
    }
    return {
        name: {
            m: [100 * float(x) for x in (values.mean(), *bootstrap_interval(values, together))]
            for m, values in found.items()
        }
        for name, found in shown.items()
    }


def _print(args, rows, seconds, asked) -> None:
    from tabulate import tabulate

    lines = []
    for name, found in rows.items():
        sign = "+" if " - " in name else ""
        cells = [
            f"{x:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]" for x, low, high in found.values()
        ]
        spent = f"{seconds[name]:.0f}" if name in seconds and name != "untuned" else ""
        lines.append([name, *cells, spent])
    print(tabulate(lines, ["", *METRICS.values(), "training s *"], disable_numparse=True))
    print(
        f"\nStrategy {args.strategy}; percent of {len(asked)} test questions, [95% interval over "
        "questions], one seed. * with compiling."
    )
    if args.to is not None:
        print(f'Saved the federated system: fedrag ask {args.to} "{asked[0].question}"')
