"""The files of sentence-transformers that say how an encoder wants to be used.

What comes before a text, how its tokens become one vector, and how two vectors are compared.
"""

import dataclasses
import json
import pathlib
from typing import Any

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.encoder import POOLING, SIMILARITIES, EncoderConfig

USE, TEXTS = "config_sentence_transformers.json", "sentence_bert_config.json"
_MODULES = ("Transformer", "Pooling", "Normalize")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """How an encoder folder wants to be used, as fields of `EncoderConfig`; `max_length` is None for as
    long as the model can.

    Without `modules.json`: mean pooling, not normalised, as sentence-transformers does.

    Raises:
      CheckpointError: modules, pooling, prompts or a similarity that are not supported.
    """
    modules = _json(folder / "modules.json", [])
    kinds = [m["type"].rpartition(".")[2] for m in modules]
    if kinds and (kinds[:2] != list(_MODULES[:2]) or any(k != "Normalize" for k in kinds[2:])):
        raise CheckpointError(
            f"{folder}/modules.json: modules {kinds} are not supported; supported: {_MODULES}, the "
            "last optional"
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
        "normalize": "Normalize" in kinds,
        "lower_case": bool(texts.get("do_lower_case")),
        "max_length": min((int(limit) for limit in limits if limit), default=None),
    } | _use(folder / USE)


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
        "pooling_mode_lasttoken": config.pooling == "lasttoken",
    }
    use = {
        "prompts": {"query": config.query_prompt, "document": config.document_prompt},
        "default_prompt_name": None,
        "similarity_fn_name": config.similarity,
    }
    _write(folder / "modules.json", modules)
    _write(folder / paths[1] / "config.json", pooling)
    _write(
        folder / TEXTS, {"max_seq_length": config.max_length, "do_lower_case": config.lower_case}
    )
    _write(folder / USE, use)


def refuse_decoder(folder: pathlib.Path, model_type: str) -> None:
    """Raises CheckpointError where a folder makes an encoder of a decoder, as Qwen3-Embedding does."""
    if (folder / "modules.json").exists():
        raise CheckpointError(
            f"modules.json: an encoder of model_type {model_type!r}, a decoder, is not supported; "
            "supported: encoders of bert, roberta, xlm-roberta and mpnet"
        )


def used_as(
    model,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    similarity: str | None = None,
):
    """A `hub.Pretrained` encoder with other prompts or another similarity than its folder tells; None
    is no other.

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
    """Prompts as `encode_query` and `encode_document` of sentence-transformers choose them, and the
    similarity."""
    settings = _json(path, {})
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(text, str | None) for text in prompts.values()
    ):
        raise CheckpointError(f"{path}: prompts must be strings by their names, got {prompts!r}")
    usual = settings.get("default_prompt_name")
    if usual is not None and usual not in prompts:
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
