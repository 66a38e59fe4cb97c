"""`fedrag`: index documents, ask questions, evaluate, tune and serve, from a shell."""

import argparse
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence

import fedrag_jax
from fedrag_jax.cli import ask, demo, evaluate, federate, index, serve, train
from fedrag_jax.cli.common import harmless
from fedrag_jax.errors import FedragError

DESCRIPTION = """\
Retrieval-augmented generation over your documents, and its fine-tuning.

  fedrag demo                                  tune a small built-in system, print a table
  fedrag index documents/ --to system/         build a system from a folder of documents
  fedrag ask system/ "Who wrote it?"           print an answer and its sources
  fedrag eval system/ --questions own.jsonl    score answers and retrieval
  fedrag train system/ own.jsonl --to tuned/   fine-tune retriever and generator
  fedrag serve tuned/                          serve OpenAI's HTTP API, or MCP
  fedrag federate init federation/             train with parties that keep their documents
"""
CODES = """\
exit codes: 0 success, 1 error, 2 wrong usage, 3 success, but some documents could not be read,
130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of `fedrag` and its subcommands."""
    top = argparse.ArgumentParser(
        "fedrag",
        description=DESCRIPTION,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fedrag {fedrag_jax.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in (
        ("demo", demo),
        ("index", index),
        ("ask", ask),
        ("eval", evaluate),
        ("train", train),
        ("serve", serve),
        ("federate", federate),
    ):
        summary = command.__doc__.partition("\n")[0]
        own = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code, see `CODES`."""
    args = parser().parse_args(argv)
    try:
        _settle()
        return args.run(args)
    except FedragError as error:
        print(f"fedrag {args.command}: {harmless(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read has gone; what is buffered has nowhere to go either.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"fedrag {args.command}: {harmless(str(error))}", file=sys.stderr)
        return 1


def _settle() -> None:
    """Sets environment variables and filters that libraries need before they are imported, and has
    characters that the locale cannot spell printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook keeps the text
            stream.reconfigure(errors="backslashreplace")
    # FAISS's threads would spin while they wait, and keep JAX's from the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_, **__: f"fedrag: {harmless(str(message))}\n"
    from fedrag_jax.data.cache import cache_folder

    # A command that ran once compiles nothing anew.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
