"""The cache folder, which keeps slow results between runs."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

from fedrag_jax.errors import ConfigError
from fedrag_jax.files import kept, read_json, write_json


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """Returns the cache folder, created if absent; default: $FEDRAG_CACHE, or ~/.cache/fedrag_jax.

    Raises:
      ConfigError: the folder cannot be created.
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
    """Returns the value stored by `remember`, or None."""
    path = cache_folder() / file
    return _read(path, path.stat().st_mtime_ns).get(key) if path.exists() else None


def remember(file: str, key: str, value: Any) -> None:
    """Stores a JSON value under a key in a file of the cache folder; prints the reason if it fails."""
    path = cache_folder() / file
    known = kept(read_json, path) or {}
    try:
        write_json(path, known | {key: value}, indent=1)
    except ConfigError as error:
        print(f"not kept for the next run: {error}", file=sys.stderr)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return kept(read_json, path) or {}
