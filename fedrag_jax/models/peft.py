"""Adapters as folders of the PEFT library: adapter_config.json and adapter_model.safetensors."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.families import FAMILIES
from fedrag_jax.models.lora import LoraConfig, add_lora
from fedrag_jax.models.network import Network, flatten, unflatten

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # stored transposed
# What PEFT does in more than one way, and our adapters in one.
_ONLY = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
    "use_rslora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "layer_replication": None, "lora_bias": False, "trainable_token_indices": None,
}  # fmt: skip


def save(
    adapters: dict, network: Network, folder: str | pathlib.Path, base: str | None = None
) -> None:
    """Writes adapters so that `load` and `peft.PeftModel.from_pretrained` open them.

    Args:
      network: the one the adapters belong to, from `add_lora`.
      base: folder or hub id of the model they change, for PEFT to find.
    """
    folder, names = pathlib.Path(folder), _modules(network)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, targets = {}, set()
    for path, leaf in flatten(adapters):
        module = names[path[:-1]]
        targets.add(module.partition("{}.")[2] or module)
        layers = np.asarray(leaf) if "{}" in module else np.asarray(leaf)[None]
        for i, matrix in enumerate(layers):
            name = f"{_PREFIX}{module.format(i)}.{_MATRICES[path[-1]]}"
            tensors[name] = np.ascontiguousarray(matrix.T)
    safetensors.numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if network.module is Decoder else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": network.lora.rank,
        "lora_alpha": network.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(network: Network, folder: str | pathlib.Path) -> tuple[Network, dict]:
    """Adapters of a PEFT folder: `(add_lora(network, ...), adapters)`, float32.

    Args:
      network: the base they were made for.

    Raises:
      CheckpointError: no such folder, an option that is not supported, or matrices that are missing,
        unexpected or of another shape (all of them at once).
    """
    folder = pathlib.Path(folder)
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = safetensors.numpy.load_file(folder / TENSORS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no PEFT adapter ({error}); give a folder with {CONFIG} and {TENSORS}"
        ) from error
    for option, supported in _ONLY.items():
        if (value := about.get(option) or supported) != supported:
            raise CheckpointError(
                f"{folder}/{CONFIG}: {option} {value!r} is not supported; supported: {supported!r}"
            )
    names = _modules(network)
    there = {re.sub(r"\.\d+\.", ".{}.", _module(name)) for name in found}
    targets = sorted({path[-1] for path, module in names.items() if module in there})
    if not targets:
        raise CheckpointError(
            f"{folder}/{TENSORS} holds no matrix of {sorted(set(names.values()))}, but of "
            f"{sorted(there)}"
        )
    network = add_lora(network, LoraConfig(about["r"], float(about["lora_alpha"]), tuple(targets)))
    leaves, problems, wanted = {}, [], set()
    for path, leaf in flatten(network.shapes()):
        if path[-1] not in _MATRICES:
            continue
        module, layers = names[path[:-1]], []
        for i in range(leaf.shape[0] if "{}" in module else 1):
            name = f"{_PREFIX}{module.format(i)}.{_MATRICES[path[-1]]}"
            wanted.add(name)
            shape = leaf.shape[-2:][::-1]
            if name not in found:
                problems.append(f"missing {name}")
            elif found[name].shape != shape:
                problems.append(f"{name} has shape {found[name].shape}, not {shape}")
            else:
                layers.append(found[name].T)
        leaves[path] = layers
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted)]
    if problems:
        raise CheckpointError(f"{folder} does not fit the network:\n  " + "\n  ".join(problems))
    stacked = {
        path: jnp.asarray(np.stack(x) if "{}" in names[path[:-1]] else x[0], jnp.float32)
        for path, x in leaves.items()
    }
    return network, unflatten(stacked.items())


def _modules(network: Network) -> dict[tuple, str]:
    """Path of every linear layer to its name in the checkpoint, `{}` for the number of the layer."""
    names = FAMILIES[network.config.family].names
    return {
        path[:-1]: names[".".join(path)].removesuffix(".weight")
        for path, _ in flatten(network.shapes())
        if path[-1] == "kernel"
    }


def _module(tensor: str) -> str:
    return tensor.removeprefix(_PREFIX).rpartition(".lora_")[0]
