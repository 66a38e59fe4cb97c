"""The files of sentence-transformers that say how a model's tokens become one vector."""

import json
import pathlib
from typing import Any

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.encoder import POOLING, EncoderConfig

_MODULES = ("Transformer", "Pooling", "Normalize")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """`pooling`, `normalize` and `max_length` (None: as long as the model can) of an encoder folder.

    Without `modules.json`: mean pooling, not normalised, as sentence-transformers does.

    Raises:
      CheckpointError: modules, pooling or default prompts that are not supported.
    """
    modules = _json(folder / "modules.json", [])
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds and (kinds[:2] != list(_MODULES[:2]) or any(k != "Normalize" for k in kinds[2:])):
        raise CheckpointError(
            f"{folder}/modules.json: modules {kinds} are not supported; supported: {_MODULES}, the "
            "last optional"
        )
    settings = _json(folder / "config_sentence_transformers.json", {})
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    if prompt:
        raise CheckpointError(
            f"{folder}/config_sentence_transformers.json: default prompt {prompt!r} is not "
            "supported; supported: none"
        )
    pooling = _json(folder / modules[1]["path"] / "config.json", {}) if modules else {}
    limits = (
        _json(folder / "tokenizer_config.json", {}).get("model_max_length"),
        _json(folder / "sentence_bert_config.json", {}).get("max_seq_length"),
    )
    return {
        "pooling": _pooling(folder, pooling),
        "normalize": "Normalize" in kinds,
        "max_length": min((int(limit) for limit in limits if limit), default=None),
    }


def write(folder: pathlib.Path, config: EncoderConfig) -> None:
    """What `read` reads."""
    kinds = _MODULES if config.normalize else _MODULES[:2]
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
    }
    limit = {"max_seq_length": config.max_length, "do_lower_case": False}
    _write(folder / "modules.json", modules)
    _write(folder / paths[1] / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", limit)


def _pooling(folder: pathlib.Path, settings: dict) -> str:
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    modes = [names.get(k, k) for k, v in settings.items() if k.startswith("pooling_mode_") and v]
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    if not settings:
        modes = ["mean"]
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
