"""Where things that took long to find out are kept from run to run."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from fedrag_jax.errors import ConfigError


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """The folder, made if absent; by default environment variable FEDRAG_CACHE, or ~/.cache/fedrag_jax.

    Raises:
      ConfigError: it cannot be made.
    """
    folder = Path(folder or os.environ.get("FEDRAG_CACHE") or Path.home() / ".cache/fedrag_jax")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache folder {folder} cannot be made ({error}); set FEDRAG_CACHE to one that can"
        ) from error
    return folder


def recall(file: str, key: str) -> Any:
    """What `remember` was told, or None."""
    path = cache_folder() / file
    return _read(path, path.stat().st_mtime_ns).get(key) if path.exists() else None


def remember(file: str, key: str, value: Any) -> None:
    """Keeps a JSON value under a key in a file of the cache folder."""
    path = cache_folder() / file
    known = json.loads(path.read_text()) if path.exists() else {}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(known | {key: value}, indent=1) + "\n")
    beside.replace(path)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return json.loads(path.read_text())
