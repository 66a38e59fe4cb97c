"""Ask a system questions; print answers and their sources.

Without a question, questions are read from standard input, one per line. If one of several questions
cannot be asked, the others are answered, with exit code 1.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from fedrag_jax.cli.common import (
    add_json,
    add_system,
    as_dict,
    harmless,
    print_json,
    printable,
)
from fedrag_jax.errors import ConfigError, DataError

AT_ONCE = 16  # questions of a file that are answered together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag ask`."""
    add_system(parser)
    parser.add_argument("questions", nargs="*", metavar="question", help="a question in quotes")
    parser.add_argument("--top-k", type=int, help="number of passages to read (default: as saved)")
    parser.add_argument(
        "--mode",
        default="concatenated",
        help="how passages are combined into one answer (default: concatenated; rag_token, "
        "rag_sequence_fast, ensemble, vote and others read them one by one; with search, the model "
        "searches while it writes)",
    )
    parser.add_argument(
        "--max-tokens", type=int, help="longest answer in tokens (default: the system's limit)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default: 0)")
    parser.add_argument("--system-prompt", help="text at the start of the prompt")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print answers while they are generated (default: on a terminal)",
    )
    parser.add_argument(
        "--no-sources", action="store_true", help="print answers without their sources"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag ask`."""
    from fedrag_jax.rag import RAGSystem

    if args.json and args.no_sources:
        raise ConfigError("--no-sources does not apply to --json: leave either out")
    if args.mode == "search" and (args.top_k, args.system_prompt) != (None, None):
        raise ConfigError(
            "--top-k and --system-prompt do not apply to --mode=search, whose searches and instruction "
            "are those of the system: leave them out"
        )
    if args.stream and args.json:
        raise ConfigError(
            "--stream prints answers while they are written, --json prints whole answers: choose one"
        )
    for number, question in enumerate(args.questions, 1):
        if not question.strip():
            raise DataError(f"question {number} is blank: ask something")
    system = RAGSystem.load(args.system, elsewhere=args.elsewhere)
    if args.top_k is not None:
        system = dataclasses.replace(system, top_k=args.top_k)
    if args.system_prompt is not None:
        system = system.under(args.system_prompt)
    how = {"mode": args.mode, "temperature": args.temperature, "seed": args.seed}
    if args.max_tokens is not None:
        how["max_new_tokens"] = args.max_tokens
    stream = args.stream
    if stream is None:
        whole = args.json or args.mode not in ("concatenated", "search")
        stream = sys.stdout.isatty() and not whole
    number, failed = 0, False
    for questions in _asked(args.questions):
        several = len(questions) > 1 and not args.no_sources
        answers = [None] * len(questions) if stream else _together(system, questions, how)
        for question, response in zip(questions, answers, strict=True):
            number += 1
            try:
                if stream:
                    _print_question(question, several)
                    _stream(system, question, how, args)
                    continue
                if response is None:
                    response = system.query(question, **how)
            except (ConfigError, DataError) as error:
                if len(args.questions) == 1:
                    raise
                failed = True
                print(f"fedrag ask: question {number}: {harmless(str(error))}", file=sys.stderr)
                continue
            if args.json:
                _print_json(question, response)
            else:
                _print_question(question, several)
                _print_response(response, how, system, args)
    return int(failed)


def _together(system, questions: Sequence[str], how) -> Sequence:
    """Returns the responses to a batch; None for each if one of the questions cannot be asked."""
    try:
        return system.batch_query(questions, **how)
    except (ConfigError, DataError):
        return [None] * len(questions)


def _asked(given: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields batches of questions: those given, or lines of standard input as they arrive."""
    if given:
        yield given
        return
    interactive, waiting = sys.stdin.isatty(), []
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    for line in _lines():
        if question := line.strip():
            waiting.append(question)
        if waiting and (interactive or len(waiting) == AT_ONCE):
            yield waiting
            waiting = []
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
    if waiting:
        yield waiting


def _lines() -> Iterator[str]:
    """Yields the lines of standard input.

    Raises:
      DataError: text in another encoding.
    """
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not {error.encoding} text ({error.reason}): save the questions as UTF-8"
        ) from error


def _print_question(question: str, several: bool) -> None:
    """Prints the question before its answer if there are several."""
    if several:
        print(f"> {harmless(question)}")


def _print_response(response, how, system, args) -> None:
    if not args.no_sources:
        _print_searches(response.searches)
    print(harmless(response.answer))
    _tell_cut(response.finish, how, system)
    if not args.no_sources and not response.searches:
        _print_sources(response.sources, response.scores, response.cited)


def _stream(system, question: str, how, args) -> None:
    if how["mode"] == "search":
        pieces = system.stream(question, **how)
        for piece in pieces:
            if isinstance(piece, str):
                print(harmless(piece), flush=True)
            elif not args.no_sources:
                _print_searches([piece])
        _tell_cut(pieces.finish, how, system)
        return
    (found,) = system.retrieve([question])
    passages = [f.passage for f in found]
    pieces = system.stream(question, passages, **how)
    for piece in pieces:
        print(harmless(piece), end="", flush=True)
    print()
    _tell_cut(pieces.finish, how, system)
    if not args.no_sources:
        named = system.cited(pieces.reasoning, passages)
        _print_sources(passages, [f.score for f in found], named)


def _tell_cut(finish: str, how, system) -> None:
    """Prints to standard error if an answer was cut off."""
    if finish == "repetition":
        print("(stopped where it began to repeat itself)", file=sys.stderr)
    if finish == "length" and how["mode"] == "search":
        print(
            "(ended before its answer; --max-tokens allows more between searches)", file=sys.stderr
        )
    elif finish == "length":
        limit = how.get("max_new_tokens", system.prompts.max_answer_tokens)
        print(f"(cut after {limit} tokens; --max-tokens allows more)", file=sys.stderr)


def _print_json(question: str, response) -> None:
    sources = zip(response.sources, response.scores, strict=True)
    print_json(
        {
            "question": question,
            "answer": response.answer,
            "cited": [p.id for p in response.cited],
            "sources": [as_dict(p, score) for p, score in sources],
            **({"searches": _searches(response)} if response.searches else {}),
            "finish": response.finish,
        }
    )


def _searches(response) -> list[dict]:
    return [{"query": q, "sources": [p.id for p in passages]} for q, passages in response.searches]


def _print_searches(searches) -> None:
    """Prints the searches of an answer and the passages they found."""
    for query, passages in searches:
        print(f"  searched for {printable(query, 90)!r}")
        for passage in passages:
            print(f"    {printable(passage.id, 60)}  {printable(passage.text, 90)}", flush=True)


def _print_sources(sources, scores, cited=()) -> None:
    for i, (passage, score) in enumerate(zip(sources, scores, strict=True), start=1):
        mark = "*" if passage in cited else " "
        text = printable(passage.text, 90)
        print(f" {mark}[{i}] {score:.3f}  {printable(passage.id, 60)}  {text}")
    print(flush=True)
