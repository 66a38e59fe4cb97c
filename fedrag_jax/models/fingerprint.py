"""What a model's results depend on, as a hash."""

import hashlib
from typing import Any

import jax
import numpy as np

from fedrag_jax.data.spelling import definition


def fingerprint(params: Any, tokenizer: Any, *settings: Any):
    """A sha256, to go on with or to be read, of parameters, a Hugging Face tokenizer and settings.

    Args:
      settings: such as a network's config: what tells how they print is what counts.
    """
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(definition(tokenizer).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest
