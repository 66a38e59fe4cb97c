"""A hash of everything that a model's results depend on."""

import hashlib
from typing import Any

import jax
import numpy as np

from fedrag_jax.data.spelling import definition


def fingerprint(params: Any, tokenizer: Any, *settings: Any):
    """Returns a sha256 object over parameters, a Hugging Face tokenizer and settings.

    Args:
      settings: other settings, such as a network's config; their printed form is hashed.
    """
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(definition(tokenizer).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest
