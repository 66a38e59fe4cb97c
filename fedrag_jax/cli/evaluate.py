"""Measure a system on public benchmarks, or on questions of your own.

Sets are mmlu, hellaswag, boolq, pubmedqa, nq, triviaqa, popqa, hotpotqa, squad, squad_v2 and scifact,
read from the folder in FEDRAG_DATA or from the Hugging Face hub. A file of your own has JSON lines
{"id", "question", "answers": [...]} and, if known, "positive_ids" and "split"; of questions without a
split, those are asked that `fedrag train` leaves alone. Of {"id", "question", "unanswerable": true} it
is right to answer nothing, as in SQuAD v2. With --to, a run that was stopped goes on.
"""

import argparse
import pathlib

from fedrag_jax.cli.common import add_json, add_system, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `fedrag eval`."""
    add_system(parser)
    parser.add_argument("sets", nargs="*", metavar="set", help="benchmarks, by name")
    parser.add_argument("--questions", type=pathlib.Path, help="a file of your own questions")
    parser.add_argument("--all", action="store_true", help="all of them, also those of no split")
    parser.add_argument(
        "--to", type=pathlib.Path, help="folder that keeps results, a row a question"
    )
    parser.add_argument("--limit", type=int, help="questions of each set, drawn by the seed")
    parser.add_argument("--split", default="", help="(each set's own with labels)")
    parser.add_argument("--source", help="hub, local, or a folder (local if it is there)")
    parser.add_argument("--shots", type=int, default=0, help="examples before each question (0)")
    parser.add_argument(
        "--by",
        default="",
        help="generation, likelihood, or letters, the likelihood of a "
        "choice's letter as MMLU's authors have it (each set's usual way)",
    )
    parser.add_argument(
        "--corpus",
        default="own",
        choices=("own", "benchmark", "gold", "none"),
        help="what is read: the system's own passages (the default), the set's, its gold ones, or none",
    )
    parser.add_argument("--mode", default="concatenated", help="see fedrag ask")
    parser.add_argument("--max-tokens", type=int, help="of an answer, at most")
    parser.add_argument(
        "--rule",
        choices=("squad", "squad_v2", "hotpotqa", "zh", "ja"),
        help="how open answers are compared: zh and ja by character, as MLQA's script does for Chinese "
        "(each set's own; squad for --questions)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="(32)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and examples (0)")
    parser.add_argument(
        "--form", default="text", choices=("text", "markdown", "latex"), help="of the table"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates."""
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
    from fedrag_jax.evaluation.benchmarks.results import table
    from fedrag_jax.evaluation.benchmarks.sets import SETS, named, own
    from fedrag_jax.rag import RAGSystem

    asked = [(named(name), args.source) for name in args.sets]
    if args.questions is not None:
        if not args.questions.is_file():
            raise ConfigError(f"--questions {args.questions} is not a file")
        asked.append((own(args.questions, args.all), args.questions))
    if not asked:
        raise ConfigError(f"nothing to measure: name sets of {[*SETS]}, or give --questions")
    system = RAGSystem.load(args.system, elsewhere=args.elsewhere)
    benchmarker = Benchmarker(
        system, args.to, batch_size=args.batch_size, seed=args.seed, progress=not args.quiet
    )
    results = []
    for known, source in asked:
        result = benchmarker.run(
            known,
            split=args.split,
            source=source,
            limit=args.limit,
            shots=args.shots,
            by=args.by,
            corpus=args.corpus,
            mode=args.mode,
            max_new_tokens=args.max_tokens,
            rule=args.rule or "",
        )
        results.append(result)
        if args.json:
            print_json(result.summary())
    if not args.json:
        print(table(results, args.form))
        for result in results:
            told = f"{result.name}: {result.n} of {result.origin['questions']} questions"
            print(f"{told} from {result.origin['source']}, {result.seconds:.1f} s")
    return 0
