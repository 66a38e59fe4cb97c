"""What a run was made with."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys

import jax

from fedrag_jax.data.examples import Dataset, content_hash
from fedrag_jax.errors import DataError

PACKAGES = ("fedrag-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "faiss-cpu", "numpy")  # fmt: skip


def write_manifest(folder: pathlib.Path, dataset: Dataset, **about) -> None:
    """`manifest.json`: commands, versions, device and the hash of the data, besides what is given.

    Raises:
      DataError: the folder holds results of other data.
    """
    path, data = folder / "manifest.json", content_hash(dataset)
    old = json.loads(path.read_text()) if path.exists() else {}
    if old and (before := old["data"]["hash"]) != data:
        raise DataError(
            f"{folder} holds results of other data: its hash was {before}, that of {dataset.name} is "
            f"{data}. Choose another --config.name, or remove the folder"
        )
    device = jax.devices()[0]
    manifest = {
        # All that have added to the folder.
        "commands": list(dict.fromkeys([*old.get("commands", ()), _command()])),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
        },
        "data": {
            "name": dataset.name,
            "hash": data,
            "passages": len(dataset.passages),
            "questions": [len(dataset.train), len(dataset.validation), len(dataset.test)],
        },
    }
    path.write_text(json.dumps(manifest | about, indent=2) + "\n")


def _command() -> str:
    """What to type for the same again."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])
