"""The manifest of a run: commands, devices, versions and data."""

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys

import jax

from fedrag_jax import files
from fedrag_jax.data.examples import Dataset, content_hash
from fedrag_jax.errors import DataError

PACKAGES = ("fedrag-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "faiss-cpu", "numpy")  # fmt: skip


def write_manifest(folder: pathlib.Path, dataset: Dataset, **about) -> None:
    """Writes `manifest.json`: every command with its device, commit and time, versions, the hash of
    the data, and the given fields.

    Raises:
      DataError: the folder holds results of other data.
    """
    path, data = folder / "manifest.json", content_hash(dataset)
    old = files.read_json(path) if path.exists() else {}
    if old and (before := old["data"]["hash"]) != data:
        origins = f"{old['data'].get('origin') or dataset.name} then, {dataset.origin} now"
        raise DataError(
            f"{folder} holds results of other data: its hash was {before}, that of {dataset.name} is "
            f"{data} ({origins}). Choose another --config.name, remove the folder, or, for a data set "
            "of the hub, give the earlier commit as --config.data.revision"
        )
    device = jax.devices()[0]
    now = {
        "command": _command(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    manifest = {
        "sessions": [*old.get("sessions", ()), now],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": {
            "name": dataset.name,
            "origin": dataset.origin,
            "hash": data,
            "passages": len(dataset.passages),
            "questions": [len(dataset.train), len(dataset.validation), len(dataset.test)],
        },
    }
    files.write_json(path, manifest | about, indent=2)


def _commit() -> str | None:
    """The commit of the running checkout, with a plus if it has changes; None without a checkout."""
    here = pathlib.Path(__file__).parent

    def git(*words):
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:  # no git here
        return None
    return commit and commit + ("+" if changed else "")


def _command() -> str:
    """The command line to repeat the run; `sys.argv` lacks arguments that programs have removed."""
    return " ".join(["python", *map(_quoted, sys.orig_argv[1:])])


def _quoted(word: str) -> str:
    """Quotes a word for a shell; readable even if the word contains single quotes."""
    plain = "'" not in word or set(word) & set('"$`\\!')
    return shlex.quote(word) if plain else f'"{word}"'
