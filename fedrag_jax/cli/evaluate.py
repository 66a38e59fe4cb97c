"""Evaluate a system on public benchmarks or on your own questions.

Benchmarks are mmlu, hellaswag, boolq, pubmedqa, nq, triviaqa, popqa, hotpotqa, squad, squad_v2 and
scifact, read from the folder in FEDRAG_DATA or from the Hugging Face hub.

Your own questions are JSON lines: {"question", "answers": [...]} with optional "id", "positive_ids" and
"split". If questions have no split, the ones that `fedrag train` holds out for testing are used. For
{"question", "unanswerable": true} an empty answer is correct, as in SQuAD v2.

With --to, an interrupted run resumes.
"""

import argparse
import pathlib

from fedrag_jax.cli.common import add_json, add_system, print_json, require_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag eval`."""
    add_system(parser)
    parser.add_argument("sets", nargs="*", metavar="set", help="name of a benchmark")
    parser.add_argument("--questions", type=pathlib.Path, help="file of your own questions")
    parser.add_argument(
        "--all",
        action="store_true",
        help="ask all of your own questions, not only those held out for testing",
    )
    parser.add_argument(
        "--to", type=pathlib.Path, help="folder for results, one row per question; resumes"
    )
    parser.add_argument(
        "--limit", type=int, help="size of a random sample of each benchmark's questions"
    )
    parser.add_argument(
        "--split", default="", help="split to ask (default: the labelled test or validation split)"
    )
    parser.add_argument(
        "--source",
        help="where benchmarks come from: hub, local or a folder (default: local if present)",
    )
    parser.add_argument(
        "--shots", type=int, default=0, help="few-shot examples before each question (default: 0)"
    )
    parser.add_argument(
        "--by",
        default="",
        help="how choices are scored: generation, likelihood (of a choice's text) or letters "
        "(likelihood of its letter, the default of MMLU); default: the benchmark's usual method",
    )
    parser.add_argument(
        "--corpus",
        default="own",
        choices=("own", "benchmark", "gold", "none"),
        help="passages to answer from: the system's own (default), the benchmark's, only gold ones, or "
        "none",
    )
    parser.add_argument(
        "--mode",
        default="concatenated",
        help="how passages are combined into one answer, see fedrag ask; in mode search the model "
        "looks up its own passages",
    )
    parser.add_argument(
        "--max-tokens", type=int, help="longest answer in tokens (default: the system's limit)"
    )
    parser.add_argument(
        "--rule",
        choices=("squad", "squad_v2", "hotpotqa", "triviaqa", "zh", "ja"),
        help="how answers are compared; zh and ja compare characters, as MLQA does for Chinese "
        "(default: the benchmark's rule; squad for --questions)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="questions at a time (default: 32)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of samples and few-shot examples (default: 0)",
    )
    parser.add_argument(
        "--form",
        choices=("text", "markdown", "latex"),
        help="format of the table (default: text)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag eval`."""
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.evaluation.benchmarks.benchmarker import Benchmarker
    from fedrag_jax.evaluation.benchmarks.results import table
    from fedrag_jax.evaluation.benchmarks.sets import SETS, named, own
    from fedrag_jax.rag import RAGSystem

    require_least(args, max_tokens=1, limit=1, shots=0, batch_size=1)
    if args.json and args.form:
        raise ConfigError("--form is about the table, and --json prints none: leave either out")
    asked = [(named(name), args.source) for name in args.sets]
    if args.all and args.questions is None:
        raise ConfigError("--all is about --questions: give them, or leave it out")
    if args.all and args.split:
        raise ConfigError(f"--all asks the questions of all splits: leave out --split {args.split}")
    if args.questions is not None:
        if not args.questions.is_file():
            raise ConfigError(f"--questions {args.questions} is not a file")
        if args.source and not args.sets:
            raise ConfigError("--source is about named sets, not about --questions: leave it out")
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
        print(table(results, args.form or "text"))
        for result in results:
            told = f"{result.name}: {result.n} of {result.origin['questions']} questions"
            searches = "" if result.searches is None else f", {result.searches:.2f} searches each"
            cut = f", {result.share_cut:.0%} of prompts truncated" if result.share_cut else ""
            print(f"{told} from {result.origin['source']}{searches}{cut}, {result.seconds:.1f} s")
    return 0
