"""Checks the options in adapter_config.json of the PEFT library; unsupported ones are refused.

Options and their meaning are those of `LoraConfig` and `check_target_module_exists` in PEFT 0.21.
"""

import re
from collections.abc import Iterable, Set

from fedrag_jax.errors import CheckpointError

# Initialisations that leave the base alone: of the others PEFT takes the fresh adapter, or a part of
# the weights that it is made of, out of the base when a folder is opened.
_BASE_STAYS = (True, False, "gaussian", "orthogonal")
# Done in one way here.
_ONLY = {"peft_type": "LORA", "bias": "none"}
# Read here, or by `peft.load`.
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "clients",
}  # fmt: skip
# Of no matter to what a trained adapter computes.
_NO_MATTER = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


def check(about: dict) -> None:
    """Raises CheckpointError for an option that would change what the adapters compute.

    Other features of PEFT (DoRA, aLoRA, QA-LoRA, modules saved whole, ...) are enabled by a non-empty
    option, so unknown non-empty options are refused too.
    """
    how = about.get("init_lora_weights", True)
    if (how.lower() if isinstance(how, str) else how) not in _BASE_STAYS:
        raise CheckpointError(
            f"init_lora_weights {how!r} is not supported, because PEFT then also changes the weights "
            f"of the base, or may; supported: {_BASE_STAYS}. Save the adapter as a plain one, with "
            "path_initial_model_for_weight_conversion of PEFT's save_pretrained, or merge it there"
        )
    for option, supported in _ONLY.items():
        if (value := about.get(option) or supported) != supported:
            raise CheckpointError(f"{option} {value!r} is not supported; supported: {supported!r}")
    for option in sorted(about.keys() - _READ - _NO_MATTER - _ONLY.keys()):
        if about[option]:
            raise CheckpointError(
                f"{option} {about[option]!r} is not supported; supported: none. Merge the adapter "
                "into its base with PEFT"
            )


def adapted(about: dict, modules: Iterable[str], there: Set[str]) -> set[str]:
    """Returns the linear layers with an adapter, such as "model.layers.0.self_attn.q_proj".

    Args:
      there: layers with matrices in the folder, used if the options name none.
    """
    if about.get("target_modules") is None:
        return there & {*modules}
    return {module for module in modules if _targeted(about, module)}


def _targeted(about: dict, module: str) -> bool:
    targets, excluded = about["target_modules"], about.get("exclude_modules")
    if excluded and _named(excluded, module):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return module != "lm_head"
        return _named(targets, module)
    if not _named(targets, module):
        return False
    layers = about.get("layers_to_transform")
    if module in targets or layers is None or layers == []:
        return True
    patterns = about.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", module):
            return int(found["number"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(names: str | list[str], module: str) -> bool:
    """Whether a regular expression matches the whole name of a module, or a listed name ends it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
