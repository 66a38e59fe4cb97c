"""Families of decoders: conversion between `config.json` and `DecoderConfig`, and tensor names."""

import dataclasses

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.family import Family, only
from fedrag_jax.models.rotary import LinearScaling, Llama3Scaling


def _read_decoder(hf: dict, **own) -> DecoderConfig:
    hf = {"hidden_act": hf.get("hidden_activation", "silu")} | hf
    act = "gelu_pytorch_tanh" if own.get("activation") == "gelu_tanh" else "silu"
    only(hf, hidden_act=act, attn_logit_softcapping=None, final_logit_softcapping=None)
    theta, scaling = _read_rope(hf)
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **own,
    )


def _read_rope(hf: dict) -> tuple[float, Llama3Scaling | LinearScaling | None]:
    """Reads `rope_parameters`, or `rope_theta` and `rope_scaling` (transformers before 5)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    only(hf | rope, partial_rotary_factor=1.0)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, Llama3Scaling(*(rope[f.name] for f in dataclasses.fields(Llama3Scaling)))
    if kind == "linear":
        return theta, LinearScaling(rope["factor"])
    raise CheckpointError(
        f"config.json: rope type {kind!r} is not supported; supported: 'default', 'linear', 'llama3'"
    )


def _write_decoder(config: DecoderConfig, architecture: str, **own) -> dict:
    """Rope settings in both places."""
    rope = {"rope_type": "default"}
    if config.rope_scaling:
        kind = "llama3" if isinstance(config.rope_scaling, Llama3Scaling) else "linear"
        rope = {"rope_type": kind} | dataclasses.asdict(config.rope_scaling)
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
    } | own


def _read_llama(hf):
    bias = hf.get("attention_bias", False)
    return _read_decoder(hf, qkv_bias=bias, o_bias=bias, mlp_bias=hf.get("mlp_bias", False))


def _write_llama(config):
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return _write_decoder(config, "LlamaForCausalLM", **own)


def _read_mistral(hf):
    window = hf.get("sliding_window", 4096)  # absent from config.json where it is the default
    return _read_decoder(hf, windows=(window,) * hf["num_hidden_layers"] if window else ())


def _write_mistral(config):
    window = config.windows[0] if config.windows else None
    return _write_decoder(config, "MistralForCausalLM", sliding_window=window)


def _read_qwen2(hf):
    return _read_decoder(hf, qkv_bias=True, windows=_read_windows(hf))


def _write_qwen2(config):
    return _write_decoder(config, "Qwen2ForCausalLM", **_write_windows(config))


def _read_qwen3(hf):
    bias = hf.get("attention_bias", False)
    hf = {"head_dim": 128} | hf
    return _read_decoder(hf, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=_read_windows(hf))


def _write_qwen3(config):
    own = {"attention_bias": config.qkv_bias} | _write_windows(config)
    return _write_decoder(config, "Qwen3ForCausalLM", **own)


def _read_windows(hf: dict) -> tuple[int, ...]:
    """Qwen: by `layer_types` where given, else the layers from `max_window_layers` on."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window", False) or not window:
        return ()
    first = hf.get("max_window_layers", 28)
    return _windows(hf, window, [i >= first for i in range(layers)])


def _windows(hf: dict, window: int, limited: list[bool]) -> tuple[int, ...]:
    """Returns the attention window of each layer, 0 for none; `layer_types` decides if given."""
    layers = hf["num_hidden_layers"]
    default = ["sliding_attention" if one else "full_attention" for one in limited]
    kinds = hf.get("layer_types") or default
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise CheckpointError(
            f"config.json: layer_types {kinds} is not supported; supported: one of "
            f"'sliding_attention', 'full_attention' for each of {layers} layers"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _kinds(config: DecoderConfig) -> list[str]:
    """`layer_types` of its windows."""
    return ["sliding_attention" if w else "full_attention" for w in config.windows]


def _write_windows(config: DecoderConfig) -> dict:
    if not config.windows:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = _kinds(config)
    return {
        "use_sliding_window": True,
        "sliding_window": max(config.windows),
        "max_window_layers": kinds.index("sliding_attention"),
        "layer_types": kinds,
    }


def _read_gemma3(hf):
    only(hf, use_bidirectional_attention=False)
    hf = _GEMMA_DEFAULTS | hf
    rope, layers = hf.get("rope_parameters") or {}, hf["num_hidden_layers"]
    everywhere = {"rope_theta": hf.get("rope_theta", 1e6)} | (hf.get("rope_scaling") or {})
    everywhere |= rope.get("full_attention") or {}
    near = {"rope_theta": hf.get("rope_local_base_freq", 10000.0)}
    near |= rope.get("sliding_attention") or {}
    only(near, rope_type="default")
    pattern = hf.get("sliding_window_pattern", 6)
    windows = _windows(hf, hf["sliding_window"], [bool((i + 1) % pattern) for i in range(layers)])
    bias = hf["attention_bias"]
    return _read_decoder(
        hf | {"rope_parameters": everywhere},
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=windows,
        activation="gelu_tanh",
        embed_scale=hf["hidden_size"] ** 0.5,
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        centred_norms=True,
        post_norms=True,
        local_rope_theta=near["rope_theta"] if windows else None,
    )


def _write_gemma3(config):
    written = _write_decoder(config, "Gemma3ForCausalLM")
    local = config.local_rope_theta or config.rope_theta
    return written | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "sliding_window": max(config.windows, default=4096),
        "layer_types": _kinds(config) or ["full_attention"] * config.num_layers,
        "rope_parameters": {
            "full_attention": written["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "rope_local_base_freq": local,
    }


# Of transformers' Gemma3TextConfig; config.json may leave out what equals them.
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}

_DECODER_LAYER = "model.layers.{}."
_DECODER_NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "layers.attention_norm.scale": _DECODER_LAYER + "input_layernorm.weight",
    "layers.attention.q_proj.kernel": _DECODER_LAYER + "self_attn.q_proj.weight",
    "layers.attention.q_proj.bias": _DECODER_LAYER + "self_attn.q_proj.bias",
    "layers.attention.q_norm.scale": _DECODER_LAYER + "self_attn.q_norm.weight",
    "layers.attention.k_proj.kernel": _DECODER_LAYER + "self_attn.k_proj.weight",
    "layers.attention.k_proj.bias": _DECODER_LAYER + "self_attn.k_proj.bias",
    "layers.attention.k_norm.scale": _DECODER_LAYER + "self_attn.k_norm.weight",
    "layers.attention.v_proj.kernel": _DECODER_LAYER + "self_attn.v_proj.weight",
    "layers.attention.v_proj.bias": _DECODER_LAYER + "self_attn.v_proj.bias",
    "layers.attention.o_proj.kernel": _DECODER_LAYER + "self_attn.o_proj.weight",
    "layers.attention.o_proj.bias": _DECODER_LAYER + "self_attn.o_proj.bias",
    "layers.mlp_norm.scale": _DECODER_LAYER + "post_attention_layernorm.weight",
    "layers.mlp.gate_proj.kernel": _DECODER_LAYER + "mlp.gate_proj.weight",
    "layers.mlp.gate_proj.bias": _DECODER_LAYER + "mlp.gate_proj.bias",
    "layers.mlp.up_proj.kernel": _DECODER_LAYER + "mlp.up_proj.weight",
    "layers.mlp.up_proj.bias": _DECODER_LAYER + "mlp.up_proj.bias",
    "layers.mlp.down_proj.kernel": _DECODER_LAYER + "mlp.down_proj.weight",
    "layers.mlp.down_proj.bias": _DECODER_LAYER + "mlp.down_proj.bias",
    "norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
_GEMMA_NAMES = _DECODER_NAMES | {
    "layers.attention_post_norm.scale": _DECODER_LAYER + "post_attention_layernorm.weight",
    "layers.mlp_norm.scale": _DECODER_LAYER + "pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.scale": _DECODER_LAYER + "post_feedforward_layernorm.weight",
}

_ROPE = r".*\.rotary_emb\.inv_freq"

DECODERS = {
    "llama": Family(Decoder, _read_llama, _write_llama, _DECODER_NAMES, "", _ROPE),
    "mistral": Family(Decoder, _read_mistral, _write_mistral, _DECODER_NAMES, "", _ROPE),
    "qwen2": Family(Decoder, _read_qwen2, _write_qwen2, _DECODER_NAMES, "", _ROPE),
    "qwen3": Family(Decoder, _read_qwen3, _write_qwen3, _DECODER_NAMES, "", _ROPE),
    "gemma3_text": Family(Decoder, _read_gemma3, _write_gemma3, _GEMMA_NAMES, "", _ROPE),
}
