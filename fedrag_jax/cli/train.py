"""Fine-tune the retriever and the generator of a system on questions about its passages.

QUESTIONS is the name of a public set, whose gold passages are found by title and answer, or a file of
JSON lines: {"question", "answers": [...]}, with optional

  id            name of the question (default: the number of its line)
  positive_ids  passages that answer the question: ids that `fedrag ask --json` prints, or ids of
                documents or JSON lines that were indexed
  topic         label by which questions are split over clients
  split         train, validation or test (default: 70, 10 and 20 percent by id)

Every factor of the learning rates is tried; the system with the best validation score is saved.
Questions marked "unanswerable" are skipped. Run the same command again to resume after a kill.
"""

import argparse
import ast
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from fedrag_jax.cli.common import add_json, add_system, print_json, require_least

USUAL_RATES = {"query": 1e-4, "adapters": 1e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag train`."""
    add_system(parser)
    parser.add_argument(
        "questions", help="file of JSON lines, or a public set such as squad or hotpotqa"
    )
    parser.add_argument("--to", type=pathlib.Path, required=True, help="folder of the tuned system")
    parser.add_argument(
        "--strategy",
        default="joint_token",
        help="retriever, generator, ralt, lsr, ra_dit, independent, two_phase, joint_token (default) "
        "or joint_sequence; an objective, such as pdist; or your own module:function, which makes a "
        "Task for a system and a dataset. retriever and independent need positive_ids",
    )
    parser.add_argument(
        "--regime",
        choices=("centralised", "federated"),
        default="centralised",
        help="pool all questions (default), or split them over clients that share only updates",
    )
    parser.add_argument(
        "--algorithm",
        default="fedavg",
        help="federated algorithm: fedavg (default), fedavgm, fedadagrad, fedadam, fedyogi, fedprox, "
        "scaffold; dpfedavg for differential privacy; against hostile clients median, trimmed_mean, "
        "krum, multi_krum, norm_bounded, filtered; for adapters also fedit, ffa, rolora, flora, "
        "fedex, flexlora",
    )
    parser.add_argument(
        "--algorithm-options",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="options of the algorithm, such as mu=0.1. All algorithms have up and down, which "
        "compress updates and model (float16, bfloat16, int8, int4, rotated_int8, rotated_int4, "
        "top_k:0.01), and secure=True, which sums masked updates",
    )
    parser.add_argument(
        "--clients", type=int, default=8, help="number of clients (default: 8); 0: one per topic"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=float("inf"),
        help="concentration of the Dirichlet split over topics (default: an even split)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds, each with an index refresh (default: 5)",
    )
    parser.add_argument(
        "--local-steps", type=int, default=5, help="steps per client and round (default: 5)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="questions per step (default: 8)")
    # None where nobody chose one.
    parser.add_argument(
        "--query-rate", type=float, help="learning rate of the retriever (default: 1e-4)"
    )
    parser.add_argument(
        "--adapter-rate",
        type=float,
        help="learning rate of the generator's adapters (default: 1e-3)",
    )
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=(0.1, 1.0, 10.0),
        help="factors of the learning rates to try (default: 0.1 1 10)",
    )
    parser.add_argument(
        "--max-answer-tokens",
        type=int,
        help="longest answer to train on and to generate, in tokens; longer ones are cut (default: the "
        "system's limit)",
    )
    parser.add_argument(
        "--remat",
        choices=("selective", "full", "none"),
        default="selective",
        help="what the backward pass through the generator recomputes: full uses the least memory and "
        "takes a third longer, none uses the most memory (default: selective)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag train`."""
    from fedrag_jax.data.datasets import load_over
    from fedrag_jax.data.json_sets import load_questions
    from fedrag_jax.data.named_sets import NAMED_SETS
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.federated.algorithms import by_name
    from fedrag_jax.rag import RAGSystem
    from fedrag_jax.rag_folder import require_new
    from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore
    from fedrag_jax.strategies.own import named
    from fedrag_jax.strategies.regimes import Budget
    from fedrag_jax.systems import training

    if args.strategy == "none":
        raise ConfigError("--strategy none trains nothing: choose another")
    named(args.strategy)  # refuses what is not there before anything is read
    options = _options(args.algorithm_options)
    by_name.check(args.algorithm, options, "--algorithm")
    if args.regime == "centralised" and (args.algorithm != "fedavg" or options):
        raise ConfigError(
            f"--algorithm {args.algorithm} and --algorithm-options are about clients' updates: add "
            "--regime=federated"
        )
    if args.alpha != float("inf") and (args.regime == "centralised" or args.clients == 0):
        raise ConfigError(
            f"--alpha {args.alpha:g} is about the split over a number of clients: add "
            "--regime=federated, with --clients above 0, or leave it out"
        )
    _require_numbers(args)
    rates = {"query": args.query_rate, "adapters": args.adapter_rate}
    if args.algorithm in by_name.OWN_STEPS and None in rates.values():
        raise ConfigError(
            f"--algorithm {args.algorithm} takes plain SGD steps, for which the default learning rates "
            "are not suitable: give --query-rate and --adapter-rate"
        )
    rates = {part: USUAL_RATES[part] if rate is None else rate for part, rate in rates.items()}
    require_new(args.to)
    start = time.perf_counter()
    system = RAGSystem.load(args.system, elsewhere=args.elsewhere)
    if not isinstance(system.store, KnowledgeStore | None):
        raise ConfigError(
            f"{args.system} answers from a store of kind {system.store.kind!r}, which does not list "
            "its passages, but training searches them: index them with fedrag index"
        )
    passages = system.retriever.passages if system.store is None else system.store.passages()
    needed = "train", "validation"
    if args.questions in NAMED_SETS and not pathlib.Path(args.questions).exists():
        dataset = load_over(args.questions, [*passages], str(args.system), needed)
    else:
        dataset = load_questions(args.questions, [*passages], needed)
    if args.max_answer_tokens is not None:
        prompts = system.prompts.answering(args.max_answer_tokens)
        system = dataclasses.replace(system, prompts=prompts)
    network = system.generator.network.recomputing(args.remat)
    system = dataclasses.replace(
        system, generator=dataclasses.replace(system.generator, network=network)
    )
    cut = system.prompts.cut(dataset.train)
    if cut:
        print(
            f"{len(cut):,} of {len(dataset.train):,} training answers are longer than "
            f"{system.prompts.max_answer_tokens} tokens and are truncated in training: "
            f"--max-answer-tokens={max(cut)} keeps all of them whole",
            file=sys.stderr,
        )
    clients = training.split(dataset.train, args.regime, args.clients, args.alpha, args.seed)
    count = args.clients or len({e.topic for e in dataset.train})
    budget = Budget(args.rounds, args.local_steps, count, args.batch_size)
    found = training.train(
        system,
        dataset,
        args.to / "training",
        strategy=args.strategy,
        regime=args.regime,
        budget=budget,
        clients=clients,
        rates=rates,
        factors=args.factors,
        seed=args.seed,
        algorithm=args.algorithm,
        options=options,
    )
    found.system.save(args.to)
    told = {
        "system": str(args.to),
        "validation": {"before": found.before, "after": found.best.scores},
        "test": found.test,
        "trials": [trial._asdict() for trial in found.trials],
        "best_factor": found.best.factor,
        "answers_cut": len(cut),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if args.json:
        print_json(told)
    else:
        _print(told, {"validation": dataset.validation, "test": dataset.test})
    return 0


def _require_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot train; loading a language model and answering takes minutes.

    Raises:
      ConfigError: such a number; the error names its option.
    """
    from fedrag_jax.errors import ConfigError

    require_least(
        args, clients=0, rounds=1, local_steps=1, batch_size=1, max_answer_tokens=1, seed=0
    )
    if not args.alpha > 0:
        raise ConfigError(f"--alpha must be above 0, got {args.alpha:g}")
    rates = {"query-rate": args.query_rate, "adapter-rate": args.adapter_rate}
    for name, values in (rates | {"factors": args.factors}).items():
        for value in values if isinstance(values, Sequence) else [values]:
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name}: learning rates must be above 0, got {value:g}")


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Parses options: "mu=0.1" gives {"mu": 0.1}.

    Raises:
      ConfigError: an option without a name or a value.
    """
    from fedrag_jax.errors import ConfigError

    options = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not name or not mark:
            raise ConfigError(f"--algorithm-options: {text!r} is not NAME=VALUE, such as mu=0.1")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word, such as weighting=uniform
    return options


def _print(told, questions) -> None:
    from tabulate import tabulate

    rows = []
    for name in ("validation", "test"):
        for when, means in (told[name] or {}).items():
            percent = [f"{100 * value:.1f}" for value in means.values()]
            rows.append([f"{name} ({len(questions[name])})", when, *percent])
    names = [*told["validation"]["before"]]
    print(tabulate(rows, ["questions", "", *names], disable_numparse=True))
    validation = told["validation"]
    if validation["after"]["em"] < validation["before"]["em"]:
        print("no trial has a validation score as good as the system before training")
    print(
        f"{told['system']}: rates times {told['best_factor']:g}, the best of "
        f"{len(told['trials'])}, in {told['seconds']:.0f} s"
    )
