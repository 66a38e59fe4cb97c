"""Converts between tensors in files and parameters of a network, by the family's table of names."""

import json
import pathlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import sentence_folders
from fedrag_jax.models.family import Family
from fedrag_jax.models.network import Network, flatten, unflatten


def save_arrays(tree: dict, path: str | pathlib.Path) -> None:
    """Saves a nested dict of arrays to one safetensors file, with names joined by dots."""
    leaves = {".".join(p): np.ascontiguousarray(leaf) for p, leaf in flatten(tree)}
    safetensors.numpy.save_file(leaves, path)


def load_arrays(path: str | pathlib.Path) -> dict:
    """Reads a file that `save_arrays` wrote, as jax arrays.

    Raises:
      CheckpointError: no such file, or not a safetensors file.
    """
    with _open(pathlib.Path(path)) as file:
        names = sorted(file.keys())
        leaves = [(tuple(n.split(".")), jnp.asarray(file.get_tensor(n))) for n in names]
    return unflatten(leaves)


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns one file, or the shards that the index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and not index.is_file():
        raise CheckpointError(
            f"{folder} has no model.safetensors, and pickled weights (pytorch_model.bin) are never "
            "opened: load them with transformers where you trust them, and save_pretrained"
        )
    if whole.is_file():
        return [whole]
    try:
        shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        strange = [shard for shard in shards if pathlib.Path(shard).name != shard]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r})") from error
    if strange:
        raise CheckpointError(f"{index} names files that are not beside it: {sorted(strange)}")
    return [folder / shard for shard in sorted(shards)]


def opened(folder: pathlib.Path) -> list:
    """Opens the safetensors files of a folder.

    Raises:
      CheckpointError: there are no files, or one cannot be read.
    """
    return [_open(file) for file in _files(folder)]


def read_params(where: pathlib.Path, files: Sequence, family: Family, network: Network, dtype):
    """Reads parameters from open files and checks each tensor; projections are in other files.

    Args:
      where: name of the source for messages.
      files: objects with `keys()`, `get_slice(name).get_shape()` and `get_tensor(name)`, as in
        safetensors. Each tensor is read on demand, so that there are never two copies of all of them.
      dtype: type of the parameters.

    Raises:
      CheckpointError: tensors that are missing, unexpected or of another shape, all reported at once.
    """
    leaves = dict(flatten(sentence_folders.parted(network.shapes())[0]))
    wanted = {}  # tensor name -> shape in the file
    for path, leaf in leaves.items():
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        wanted |= dict.fromkeys(_names(family, path, leaf), shape)
    found, problems = {}, []
    every = [(file, stored) for file in files for stored in sorted(file.keys())]
    for file, stored in every:
        # Early BERT checkpoints have names that transformers still reads.
        name = stored.removeprefix(family.prefix)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in wanted:
            found[name] = file, stored
            shape = tuple(file.get_slice(stored).get_shape())
            if shape != wanted[name]:
                problems.append(f"{stored} has shape {shape}, config.json asks for {wanted[name]}")
        # A head in the table but not wanted is tied to the embedding.
        elif name not in family.names.values() and not re.fullmatch(family.ignored, name):
            problems.append(f"unexpected {stored}")
    problems += [f"missing {name}" for name in wanted if name not in found]
    if problems:
        raise CheckpointError(
            f"{where} does not hold the model its config.json describes:\n  "
            + "\n  ".join(problems)
        )

    def gather(path, leaf):
        places = [found[name] for name in _names(family, path, leaf)]
        arrays = [file.get_tensor(stored) for file, stored in places]
        array = np.stack(arrays) if path[0] == "layers" else arrays[0]
        return jnp.asarray(array.swapaxes(-1, -2) if path[-1] == "kernel" else array, dtype)

    return unflatten((path, gather(path, leaf)) for path, leaf in leaves.items())


def _names(family: Family, path: tuple, leaf) -> list[str]:
    """Returns the names of the tensors of a parameter: one, or one per layer."""
    name = family.names[".".join(path)]
    return [name.format(i) for i in range(leaf.shape[0])] if path[0] == "layers" else [name]


def to_tensors(family: Family, params: dict, dtype) -> dict[str, np.ndarray]:
    """Converts parameters to the names and shapes of transformers."""
    tensors = {}
    for path, leaf in flatten(params):
        with np.errstate(over="ignore"):  # save refuses what is not finite
            array = np.asarray(leaf).astype(dtype)
        array = np.ascontiguousarray(array.swapaxes(-1, -2) if path[-1] == "kernel" else array)
        layers = array if path[0] == "layers" else [array]
        tensors |= dict(zip(_names(family, path, leaf), layers, strict=True))
    return tensors
