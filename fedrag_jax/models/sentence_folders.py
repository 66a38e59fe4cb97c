"""Reads and writes the files of sentence-transformers that define the use of an encoder: prompts,
pooling, and similarity.
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

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.pooling import (
    POOLING,
    PROJECTION,
    SIMILARITIES,
    Projection,
    Use,
    projection_name,
)

WEIGHTS = "model.safetensors"  # of a projection, in a folder of its own
USE, TEXTS = "config_sentence_transformers.json", "sentence_bert_config.json"


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the settings of an encoder folder, as fields of `Use`; `max_length` None means the model's
    maximum.

    Without `modules.json` the settings are mean pooling and no normalisation, as in
    sentence-transformers.

    Raises:
      CheckpointError: unsupported modules, pooling, prompts or similarity.
    """
    modules = _json(folder / "modules.json", [])
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds and not re.fullmatch("Transformer Pooling( Dense)*( Normalize)*", " ".join(kinds)):
        raise CheckpointError(
            f"{folder}/modules.json: modules {kinds} are not supported; supported: Transformer, "
            "Pooling, any number of Dense, and Normalize or not"
        )
    pooling = _json(folder / modules[1]["path"] / "config.json", {}) if modules else {}
    texts = _json(folder / TEXTS, {})
    _refuse(folder / TEXTS, texts, "query_length", "document_length", "query_expansion")
    limits = (
        _json(folder / "tokenizer_config.json", {}).get("model_max_length"),
        texts.get("max_seq_length"),
    )
    return {
        "pooling": _pooling(folder, pooling),
        "projections": tuple(map(_projection, _dense_folders(folder))),
        "normalize": "Normalize" in kinds,
        "lower_case": bool(texts.get("do_lower_case")),
        "max_length": min((int(limit) for limit in limits if limit), default=None),
    } | _use(folder / USE)


def write(folder: pathlib.Path, config: Use, tensors: dict[str, np.ndarray]) -> None:
    """Writes the files that `read` and `read_projections` read.

    Args:
      tensors: tensors from `projection_tensors`.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * len(config.projections)]
    kinds += ["Normalize"] * config.normalize
    paths = [f"{i}_{kind}" if i else "" for i, kind in enumerate(kinds)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": config.pooling == "cls",
        "pooling_mode_mean_tokens": config.pooling == "mean",
        "pooling_mode_lasttoken": config.pooling == "lasttoken",
    }
    use = {
        "prompts": {"query": config.query_prompt, "document": config.document_prompt},
        "default_prompt_name": None,
        "similarity_fn_name": config.similarity,
    }
    _write(folder / "modules.json", modules)
    _write(folder / paths[1] / "config.json", pooling)
    size = config.hidden_size
    for i, projection in enumerate(config.projections):
        own = f"{projection_name(i)}."
        _write(folder / paths[2 + i] / "config.json", _told(projection, size))
        safetensors.numpy.save_file(
            {n.removeprefix(own): x for n, x in tensors.items() if n.startswith(own)},
            folder / paths[2 + i] / WEIGHTS,
            metadata={"format": "pt"},
        )
        size = projection.size
    _write(
        folder / TEXTS, {"max_seq_length": config.max_length, "do_lower_case": config.lower_case}
    )
    _write(folder / USE, use)


def parted(params: dict) -> tuple[dict, dict]:
    """Splits parameters into those of the model's own file and those of projections (one file each)."""
    outside = {name: layer for name, layer in params.items() if name.startswith(PROJECTION)}
    return {name: part for name, part in params.items() if name not in outside}, outside


def projection_tensors(params: dict, dtype) -> dict[str, np.ndarray]:
    """Returns parameters of projections in sentence-transformers' format, by projection and tensor."""
    tensors = {}
    for name, layer in params.items():
        with np.errstate(over="ignore"):  # hub.save refuses what is not finite
            for part, array in layer.items():
                array = np.asarray(array).astype(dtype)
                tensor = {"kernel": "weight"}.get(part, part)
                tensors[f"{name}.linear.{tensor}"] = np.ascontiguousarray(array.T)
    return tensors


def read_projections(folder: pathlib.Path, config: Use, dtype) -> dict[str, dict]:
    """Reads the parameters of the config's projections, by name.

    Raises:
      CheckpointError: weights that are missing, damaged, or of another shape.
    """
    params, size = {}, config.hidden_size
    for i, projection in enumerate(config.projections):
        file = _dense_folders(folder)[i] / WEIGHTS
        try:
            tensors = safetensors.numpy.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}); pickled weights are never opened"
            ) from error
        wanted = {"linear.weight": (projection.size, size)}
        wanted |= {"linear.bias": (projection.size,)} if projection.bias else {}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != wanted:
            raise CheckpointError(f"{file} holds {found}, its config.json asks for {wanted}")
        layer = {n.removeprefix("linear."): jnp.asarray(x.T, dtype) for n, x in tensors.items()}
        layer["kernel"] = layer.pop("weight")
        params[projection_name(i)], size = layer, projection.size
    return params


def encodes(folder: pathlib.Path) -> bool:
    """Returns whether a folder declares its model an encoder, even if its architecture is a decoder."""
    return (folder / "modules.json").exists()


def used_as(
    model,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    similarity: str | None = None,
):
    """Returns a `hub.Pretrained` encoder with other prompts or another similarity; None keeps the
    folder's.

    Raises:
      ConfigError: an unknown similarity.
    """
    told = {
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "similarity": similarity,
    }
    told = {name: value for name, value in told.items() if value is not None}
    if not told:
        return model
    config = dataclasses.replace(model.network.config, **told)
    return dataclasses.replace(model, network=dataclasses.replace(model.network, config=config))


def _use(path: pathlib.Path) -> dict[str, str]:
    """Reads the prompts that `encode_query` and `encode_document` of sentence-transformers use, and the
    similarity."""
    settings = _json(path, {})
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise CheckpointError(f"{path}: prompts must be strings by their names, got {prompts!r}")
    usual = settings.get("default_prompt_name")
    if usual is not None and usual not in {*prompts, "query", "document"}:
        raise CheckpointError(
            f"{path}: default_prompt_name {usual!r} is none of the prompts {sorted(prompts)}"
        )

    def prompt(*names: str) -> str:
        return prompts.get(next((name for name in names if name in prompts), usual)) or ""

    name = settings.get("similarity_fn_name") or "cosine"
    similarity = {"dot_score": "dot"}.get(name, name)
    if similarity not in SIMILARITIES:
        raise CheckpointError(
            f"{path}: similarity_fn_name {name!r} is not supported; supported: {SIMILARITIES}"
        )
    return {
        "query_prompt": prompt("query"),
        "document_prompt": prompt("document", "passage", "corpus"),
        "similarity": similarity,
    }


def _dense_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    modules = _json(folder / "modules.json", [])
    return [folder / m["path"] for m in modules if m["type"].endswith(".Dense")]


def _projection(path: pathlib.Path) -> Projection:
    told = _json(path / "config.json", {})
    for side in ("module_input_name", "module_output_name"):
        if told.get(side, "sentence_embedding") not in (None, "sentence_embedding"):
            raise CheckpointError(f"{path}/config.json: {side} {told[side]!r} is not supported")
    activation = told.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = activation.rpartition(".")[2]
    return Projection(told["out_features"], activation, told.get("bias", True))


def _told(projection: Projection, size: int) -> dict[str, Any]:
    place = "linear" if projection.activation == "Identity" else "activation"
    return {
        "in_features": size,
        "out_features": projection.size,
        "bias": projection.bias,
        "activation_function": f"torch.nn.modules.{place}.{projection.activation}",
    }


def _refuse(path: pathlib.Path, settings: dict, *options: str) -> None:
    for option in options:
        if settings.get(option) is not None:
            raise CheckpointError(f"{path}: {option} {settings[option]!r} is not supported")


def _pooling(folder: pathlib.Path, settings: dict) -> str:
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    names["pooling_mode_lasttoken"] = "lasttoken"
    modes = [names.get(k, k) for k, v in settings.items() if k.startswith("pooling_mode_") and v]
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    if not settings:
        modes = ["mean"]
    if not settings.get("include_prompt", True):
        raise CheckpointError(
            f"{folder}: pooling with include_prompt false is not supported; supported: true"
        )
    if len(modes) != 1 or modes[0] not in POOLING:
        raise CheckpointError(
            f"{folder}: pooling {modes} is not supported; supported: one of {POOLING}"
        )
    return modes[0]


def _json(path: pathlib.Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error


def _write(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
