"""Reads and writes adapters as PEFT folders: adapter_config.json and adapter_model.safetensors."""

import json
import pathlib
import re
from collections.abc import Set

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import peft_options
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.families import family_for
from fedrag_jax.models.lora import LoraConfig, add_lora
from fedrag_jax.models.network import Network, flatten, unflatten

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # stored transposed


def save(
    adapters: dict,
    network: Network,
    folder: str | pathlib.Path,
    base: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes adapters so that `load` and `peft.PeftModel.from_pretrained` open them.

    Args:
      adapters: adapters of one model, or stacked [K, ...] of K clients. Stacked adapters are saved in
        one file, which `load` opens whole or for one client, but PEFT does not.
      network: the network of the adapters, from `add_lora`.
      base: folder or hub id of the base model, for PEFT.
      dtype: type in the file, "float32" or "float16".

    Raises:
      CheckpointError: another dtype, or an adapter too large for float16.
    """
    if dtype not in ("float32", "float16"):
        raise CheckpointError(f"dtype must be 'float32' or 'float16', got {dtype!r} ({folder})")
    if network.lora is None:
        raise CheckpointError(f"{folder}: give the network the adapters belong to, from add_lora")
    folder, names, config = pathlib.Path(folder), _modules(network), network.lora
    tensors, clients = {}, None
    for path, leaf in flatten(adapters):
        with np.errstate(over="ignore"):
            array = np.asarray(leaf).astype(dtype)
        if not np.isfinite(array).all():
            remedy = "it holds NaN or infinity" if dtype == "float32" else "choose dtype='float32'"
            raise CheckpointError(
                f"{folder}: {'.'.join(path)} is not finite as {dtype}; nothing was written; {remedy}"
            )
        for name, index in _tensors(network, names[path[:-1]], path):
            tensors[name] = np.ascontiguousarray(array[index].swapaxes(-1, -2))
            clients = len(array) if tensors[name].ndim > 2 else None
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    modules = {path: names[path[:-1]] for path, _ in flatten(adapters)}
    others = {*names.values()} - {*modules.values()}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if network.module is Decoder else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(
            {t for m in modules.values() for t in _targets(m, others, network.config.num_layers)}
        ),
        "inference_mode": True,
    }
    for path, module in modules.items():
        sizes = config.sizes(path[-2], network.config.num_layers if "{}" in module else None)
        for i, (rank, alpha) in enumerate(sizes):
            if rank != config.rank:
                about["rank_pattern"][module.format(i)] = rank
            if alpha != config.alpha:
                about["alpha_pattern"][module.format(i)] = alpha
    if clients is not None:
        about["clients"] = clients
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(
    network: Network, folder: str | pathlib.Path, client: int | None = None
) -> tuple[Network, dict]:
    """Reads a folder; returns `(add_lora(network, ...), adapters)`, float32.

    With `layers_to_transform`, the other layers of the same name get adapters of zeros. These add
    nothing and get no gradient, so training does not change them.

    Args:
      network: the base network of the adapters.
      client: number of the client to read from stacked adapters; None reads all of them, stacked.

    Raises:
      CheckpointError: an unknown folder or client, an unsupported option, or matrices that are missing,
        unexpected or of another shape (all reported at once).
    """
    folder = pathlib.Path(folder)
    about = _read_config(folder)
    clients, family = about.get("clients"), family_for(network)
    if client is not None and not 0 <= client < (clients or 0):
        raise CheckpointError(f"{folder} holds adapters of {clients or 'no'} clients, not {client}")
    stacked = () if clients is None or client is not None else (clients,)
    with _open(folder) as file:
        found = set(file.keys())
        there = {_module(name) for name in found}
        names = _modules(network, there)
        network, adapted = _with_adapters(network, folder, about, names, there)
        leaves, problems, wanted = [], [], set()
        for path, leaf in flatten(network.shapes()):
            if path[-1] not in _MATRICES:
                continue
            array = np.zeros((*stacked, *leaf.shape), np.float32)
            for name, index in _tensors(network, names[path[:-1]], path):
                if _module(name) not in adapted:
                    continue
                wanted.add(name)
                if name not in found:
                    problems.append(f"missing {name}")
                    continue
                tensor = file.get_tensor(name) if client is None else file.get_slice(name)[client]
                if tensor.swapaxes(-1, -2).shape == array[index].shape:
                    array[index] = tensor.swapaxes(-1, -2)
                else:
                    shape = array[index].swapaxes(-1, -2).shape
                    problems.append(f"{name} has shape {tensor.shape}, not {shape}")
            leaves.append((path, jnp.asarray(array)))
    # PEFT adds the frozen layer itself if the adapted one is a head.
    wanted |= {f"{_PREFIX}{module}.base_layer.weight" for module in adapted}
    ignored = re.compile(family.ignored)  # as in the base: modules that do not reach the output
    problems += [
        f"unexpected {name}"
        for name in sorted(found - wanted)
        if not ignored.fullmatch(name.removeprefix(_PREFIX).removeprefix(family.prefix))
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit the network:\n  " + "\n  ".join(problems))
    return network, unflatten(leaves)


def _read_config(folder: pathlib.Path) -> dict:
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        peft_options.check(about)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{CONFIG}: {error}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise _no_adapter(folder, error) from error
    return about


def _open(folder: pathlib.Path):
    try:
        return safetensors.safe_open(folder / TENSORS, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise _no_adapter(folder, error) from error


def _no_adapter(folder: pathlib.Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not a PEFT adapter ({error}); give a folder with {CONFIG} and {TENSORS}"
    )


def _with_adapters(network: Network, folder, about: dict, names: dict, there: set[str]):
    """Returns the network for the adapters of a folder, and the modules that have one.

    Args:
      names: names of the network's linear layers, from `_modules`.
      there: modules with matrices in the folder.
    """
    layers = network.config.num_layers

    def each(module):
        return [module.format(i) for i in range(layers if "{}" in module else 1)]

    try:
        every = [module for some in names.values() for module in each(some)]
        adapted = peft_options.adapted(about, every, there)
        targets = sorted({p[-1] for p, module in names.items() if adapted & {*each(module)}})
        if not targets or not adapted & there:
            kinds = sorted({re.sub(r"\.\d+\.", ".{}.", module) for module in there})
            raise CheckpointError(
                f"{folder}/{TENSORS} holds no matrix of {sorted(set(names.values()))} that {CONFIG} "
                f"names, but of {kinds}"
            )
        return add_lora(network, _config(about, targets, names, layers)), adapted
    except (re.error, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/{CONFIG} is malformed ({error!r})") from error


def _tensors(network: Network, module: str, path: tuple):
    """Yields (tensor name, its index in the array of `path`, whether transposed) for each layer."""
    layers = network.config.num_layers if "{}" in module else None
    for i, (rank, _) in enumerate(network.lora.sizes(path[-2], layers)):
        matrix = np.s_[:, :rank] if path[-1] == "lora_a" else np.s_[:rank, :]
        name = f"{_PREFIX}{module.format(i)}.{_MATRICES[path[-1]]}"
        yield name, (..., *matrix) if layers is None else (..., i, *matrix)


def _config(about: dict, targets: list[str], names: dict, layers: int) -> LoraConfig:
    """Returns the sizes in adapter_config.json; PEFT matches patterns with the end of a module's
    name."""
    usual = about["r"], float(about["lora_alpha"])

    def size(module: str) -> tuple[int, float]:
        found = []
        for option, default in zip(("rank_pattern", "alpha_pattern"), usual, strict=True):
            fits = (
                value
                for pattern, value in (about.get(option) or {}).items()
                if re.fullmatch(rf"(.*\.)?({pattern})", module)
            )
            found.append(next(fits, default))
        return int(found[0]), float(found[1])

    patterns = []
    for path, module in names.items():
        if path[-1] not in targets:
            continue
        for i in range(layers if "{}" in module else 1):
            place = f"layers.{i}.{path[-1]}" if "{}" in module else path[-1]
            if (differs := size(module.format(i))) != usual:
                patterns.append((re.escape(place), *differs))
    return LoraConfig(*usual, tuple(targets), tuple(patterns))


def _modules(network: Network, there: Set[str] = frozenset()) -> dict[tuple, str]:
    """Returns the name in the checkpoint of every linear layer by its path, `{}` for the number of the
    layer; Dense projections, which get no adapters, are left out.

    Args:
      there: modules with matrices in a folder. If they have the family's prefix, as those trained over
        a model with a head do, the names get it too.
    """
    family = family_for(network)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in there) else ""
    return {
        path[:-1]: prefix + family.names[".".join(path)].removesuffix(".weight")
        for path, _ in flatten(network.shapes())
        if path[-1] == "kernel" and ".".join(path) in family.names
    }


def _targets(module: str, others: Set[str], layers: int) -> list[str]:
    """Returns names by which PEFT finds a module, but none of the others: the end of its name, unless
    another ends so."""
    short = module.partition("{}.")[2] or module
    if any(other.endswith(f".{short}") for other in others):
        return [module.format(i) for i in range(layers)]
    return [short]


def _module(tensor: str) -> str:
    return tensor.removeprefix(_PREFIX).rpartition(".lora_")[0]
