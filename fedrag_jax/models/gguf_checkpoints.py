"""GGUF files of llama.cpp presented as Hugging Face checkpoints, with `config.json` and tensor names.

The changes of llama.cpp's converter are reverted: the row order of Llama's queries and keys, the one
added to Gemma's norms, and rope scaling stored as a tensor of factors.
"""

import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.decoder_families import DECODERS
from fedrag_jax.models.gguf_files import GGUFFile
from fedrag_jax.models.gguf_tokenizers import read_tokenizer

# general.architecture to model_type; Mistral's is "llama" with a window.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scale_linear", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attention.sliding_window_pattern", "rope.dimension_count_swa", "tensor_data_layout",
}  # fmt: skip
# Settings that say nothing where they have this value.
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "use_parallel_residual": False,
}
_LLAMA3 = (1.0, 4.0, 8192)  # low and high factor, positions of the first training: of all Llama 3
_BASE = {"gemma3_text": 1e6}  # rope.freq_base where a file has none


class _Shape(NamedTuple):
    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape


class GGUFCheckpoint:
    """A GGUF file with the interface of an open safetensors file, and its `config`.

    Raises:
      ConfigError, CheckpointError: as `GGUFFile`; an architecture or a setting that is not supported.
    """

    def __init__(self, path: pathlib.Path):
        self.file = GGUFFile(path)
        architecture = self.file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture {architecture!r} is not supported; supported: "
                f"{sorted(ARCHITECTURES)}"
            )
        if self.file.metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path} is one of {self.file.metadata['split.count']} parts: merge them with "
                "llama-gguf-split --merge"
            )
        self.architecture = architecture
        self.config = self._config()
        names = self._names()
        self._stored = {names[stored]: stored for stored in self.file.tensors if stored in names}
        unknown = sorted({*self.file.tensors} - {*names} - {"rope_freqs.weight"})
        if unknown:
            raise CheckpointError(f"{path}: tensors {unknown} are not part of a {architecture}")

    def tokenizer(self):
        """A Hugging Face tokenizer, as `read_tokenizer`."""
        return read_tokenizer(self.file.metadata, self.file.path)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text or a chat turn."""
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        told = [self.file.metadata.get(f"tokenizer.ggml.{name}") for name in names]
        return tuple(sorted({end for end in told if end is not None}))

    # --- as a safetensors file -----------------------------------------------------------------

    def keys(self) -> list[str]:
        """The Hugging Face names of all tensors."""
        return list(self._stored)

    def get_slice(self, name: str) -> "_Shape":
        """A tensor's shape."""
        return _Shape(self.file.tensors[self._stored[name]].shape)

    def get_tensor(self, name: str) -> np.ndarray:
        """Returns a tensor in float32, in Hugging Face's layout."""
        array = self.file.array(self._stored[name])
        for part, heads in (
            ("self_attn.q_proj", "num_attention_heads"),
            ("self_attn.k_proj", "num_key_value_heads"),
        ):
            if part in name and self.architecture in ("llama", "mistral"):
                # Pairs (2i, 2i + 1) of a head there, (i, i + E/2) here.
                pairs = array.reshape(self.config[heads], -1, 2, *array.shape[1:])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            array = array - 1
        return array

    def _names(self) -> dict[str, str]:
        """Returns the map from names in the file to Hugging Face names, for all tensors of the
        architecture."""
        from gguf import MODEL_ARCH, get_tensor_name_map  # an extra

        layers = self.config["num_hidden_layers"]
        known = MODEL_ARCH[self.architecture.replace("mistral", "llama").upper()]
        table = get_tensor_name_map(known, layers)
        names = {}
        for name in DECODERS[self.config["model_type"]].names.values():
            for one in {name.format(i) for i in range(layers)}:
                stored = table.get_name(one, try_suffixes=(".weight", ".bias"))
                names |= {stored: one} if stored else {}
        return names

    # --- config.json ---------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        told, where = self.file.metadata, self.file.path
        prefix = f"{self.architecture}."
        own = {k.removeprefix(prefix): v for k, v in told.items() if k.startswith(prefix)}
        kept = ("final_logit_softcapping", "attn_logit_softcapping")  # the family's reader judges
        strange = {
            name: value
            for name, value in own.items()
            if name not in (*_READ, *kept) and _NEUTRAL.get(name, ...) != value
        }
        if strange:
            raise CheckpointError(
                f"{where}: settings {sorted(prefix + name for name in strange)} are not supported"
            )
        try:
            kind = ARCHITECTURES[self.architecture]
            if kind == "llama" and own.get("attention.sliding_window"):
                kind = "mistral"
            embedding = self.file.tensors["token_embd.weight"]
            heads = own["attention.head_count"]
            config = {
                "model_type": kind,
                "vocab_size": embedding.shape[0],
                "hidden_size": own["embedding_length"],
                "intermediate_size": own["feed_forward_length"],
                "num_hidden_layers": own["block_count"],
                "num_attention_heads": heads,
                "num_key_value_heads": own.get("attention.head_count_kv", heads),
                "max_position_embeddings": own["context_length"],
                "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
                "tie_word_embeddings": "output.weight" not in self.file.tensors,
            }
            several = sorted(name for name, value in config.items() if isinstance(value, list))
            if several:
                raise CheckpointError(f"{where}: {several} differ from layer to layer")
            counts = [v for name, v in config.items() if name not in ("model_type", "rms_norm_eps")]
            # A layer has tensors, so that their number bounds that of the layers.
            if not all(isinstance(v, int) and v >= 0 for v in counts) or not (
                heads > 0 and 0 < own["block_count"] <= len(self.file.tensors)
            ):
                raise CheckpointError(f"{where}: impossible sizes: {config}")
            config["head_dim"] = own.get(
                "attention.key_length", own["embedding_length"] // config["num_attention_heads"]
            )
            config |= {name: own[name] for name in kept if name in own}
            config |= self._rope(own, kind, config["head_dim"])
        except KeyError as error:
            raise CheckpointError(f"{where} does not say {error}") from error
        config |= self._windows(own, kind)
        if kind in ("llama", "qwen3"):
            config["attention_bias"] = "blk.0.attn_q.bias" in self.file.tensors
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in self.file.tensors
        if kind == "gemma3_text":
            # As llama.cpp has it: the 27B, of 62 layers, is the one that differs.
            wide = config["hidden_size"] // config["num_attention_heads"]
            scalar = wide if config["num_hidden_layers"] == 62 else config["head_dim"]
            config["query_pre_attn_scalar"] = scalar
        return config

    def _windows(self, own: dict, kind: str) -> dict[str, Any]:
        window = own.get("attention.sliding_window")
        if kind in ("mistral", "llama"):
            return {"sliding_window": window or None}
        if kind != "gemma3_text":
            if window:
                raise CheckpointError(
                    f"{self.file.path}: {self.architecture}.attention.sliding_window {window} does not "
                    "say which layers have it; load the Hugging Face folder"
                )
            return {}
        pattern = own.get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            kinds = ["sliding_attention" if one else "full_attention" for one in pattern]
            return {"sliding_window": window, "layer_types": kinds}
        return {"sliding_window": window, "sliding_window_pattern": pattern}

    def _rope(self, own: dict, kind: str, head_dim: int) -> dict[str, Any]:
        where = self.file.path
        sizes = (
            "rope.dimension_count", "rope.dimension_count_swa", "attention.key_length_swa",
            "attention.value_length", "attention.value_length_swa",
        )  # fmt: skip
        for name in sizes:
            if own.get(name, head_dim) != head_dim:
                raise CheckpointError(
                    f"{where}: {self.architecture}.{name} {own[name]} is not the {head_dim} numbers "
                    "of a head, which is not supported"
                )
        theta = own.get("rope.freq_base", _BASE.get(kind, 10000.0))
        factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
        scaling = own.get("rope.scaling.type", "linear" if factor != 1 else "none")
        rope = {"rope_type": "default"}
        if "rope_freqs.weight" in self.file.tensors:
            rope = self._llama3(theta, head_dim)
        elif scaling == "linear" and factor != 1:
            rope = {"rope_type": "linear", "factor": factor}
        elif scaling not in ("none", "linear"):
            rope = {"rope_type": scaling}  # which the family refuses by name
        rope |= {"rope_theta": theta}
        if kind != "gemma3_text":
            return {"rope_parameters": rope}
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Recovers Llama 3's rope scaling from the factors stored in the file."""
        factors = self.file.array("rope_freqs.weight").astype(np.float64)
        frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if factors.shape != frequencies.shape:
            raise CheckpointError(
                f"{self.file.path}: rope_freqs.weight has shape {factors.shape}, a head asks for "
                f"{frequencies.shape}"
            )
        if np.allclose(factors, 1):
            return {"rope_type": "default"}
        factor = float(factors.max())
        # The share of the frequency as it was: linear in it, (turns - low) / (high - low), in between.
        share = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (share > 1e-3) & (share < 1 - 1e-3)
        candidates = [_LLAMA3]
        if between.sum() >= 2:
            slope, start = np.polyfit(frequencies[between], share[between], 1)
            span = -1 / start  # with low = 1
            candidates.append((1.0, float(f"{1 + span:.4g}"), round(2 * math.pi * slope * span)))
        for low, high, positions in candidates:
            turns = positions * frequencies / (2 * math.pi)
            expected = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(share, expected, atol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": positions,
                }
        raise CheckpointError(
            f"{self.file.path}: rope_freqs.weight holds factors that are not Llama 3's: not supported"
        )
