"""Where things that took long to find out are kept from run to run."""

import os
from pathlib import Path

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
