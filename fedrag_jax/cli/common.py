"""Arguments and output functions shared by several subcommands."""

import argparse
import json
import pathlib
import unicodedata
from typing import Any

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError


def add_system(parser: argparse.ArgumentParser) -> None:
    """Adds the argument for a saved system's folder, and --elsewhere."""
    parser.add_argument("system", type=pathlib.Path, help="folder of a saved system")
    add_elsewhere(parser)


def add_elsewhere(parser: argparse.ArgumentParser) -> None:
    """Adds the option that allows a saved system to connect to a server."""
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="allow a saved system to connect to the server, or run the command, that its folder "
        "names; use it only for folders that you trust",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option --json."""
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Refuses numbers that are too small, before anything is read; an option that is None passes.

    Args:
      least: smallest value of each option, by its name in `args`.

    Raises:
      ConfigError: a smaller value; the error names the option.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} must be at least {smallest}, got {value}")


def print_json(told: Any) -> None:
    """Prints one line of JSON."""
    print(json.dumps(told, ensure_ascii=False), flush=True)


def harmless(text: str) -> str:
    """Returns a text without terminal control characters; passages and file names are untrusted."""

    def shown(c: str) -> str:
        if c.isprintable() or c in "\n\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
            return c
        return " " if c == "\t" or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"

    return "".join(map(shown, text))


def printable(text: str, most: int = 0) -> str:
    """Returns a harmless text on one line, cut at `most` characters."""
    line = harmless(" ".join(text.split()))
    return line if not most or len(line) <= most else line[: most - 1].rstrip() + "…"


def as_dict(passage: Passage, score: float) -> dict[str, Any]:
    """Returns a source as a dictionary for JSON."""
    return {"id": passage.id, "title": passage.title, "text": passage.text, "score": score}
