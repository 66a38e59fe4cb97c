"""The families of models by Hugging Face model_type: network, tensor names, options.

To add a family, follow the checklist in docs/models.md.
"""

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.causal_encoder import CausalEncoder, CausalEncoderConfig
from fedrag_jax.models.decoder_families import DECODERS
from fedrag_jax.models.encoder_families import ENCODERS
from fedrag_jax.models.family import Family
from fedrag_jax.models.network import Network

FAMILIES = DECODERS | ENCODERS


def family_of(hf: dict) -> Family:
    """Returns the family of a `config.json`.

    Raises:
      CheckpointError: an unsupported model_type, or a quantised checkpoint.
    """
    if hf.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {hf.get('model_type')!r} is not supported; supported: "
            f"{sorted(FAMILIES)}"
        )
    if hf.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config is not supported; load unquantized weights"
        )
    return FAMILIES[hf["model_type"]]


def family_for(network: Network) -> Family:
    """Returns the family whose checkpoints hold the parameters of a network."""
    family = FAMILIES[network.config.family]
    return encoding(family) if network.module is CausalEncoder else family


def encoding(family: Family) -> Family:
    """Returns a family of decoders as encoders; their checkpoints have no head and no name prefix."""

    def read(hf: dict, **sentence) -> CausalEncoderConfig:
        shape = vars(family.read(hf)) | {"tie_embeddings": True}
        longest = sentence.pop("max_length") or shape["max_positions"]
        longest = min(longest, shape["max_positions"])
        return CausalEncoderConfig(**shape, max_length=longest, **sentence)

    names = {path: name.removeprefix("model.") for path, name in family.names.items()}
    names.pop("lm_head.kernel")
    ignored = rf"{family.ignored}|lm_head\..*"
    return Family(CausalEncoder, read, family.write, names, "model.", ignored)
