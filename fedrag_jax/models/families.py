"""What a model_type of Hugging Face is here: which network, which names, which options.

To add a family, follow the checklist in docs/models.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models.causal_encoder import CausalEncoder, CausalEncoderConfig
from fedrag_jax.models.decoder import Decoder, DecoderConfig, Llama3Scaling
from fedrag_jax.models.encoder import Encoder, EncoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one model_type are read and written.

    Attributes:
      module: `Decoder` or `Encoder`.
      read: the network's config of a `config.json`; raises CheckpointError at an option that this
        network does not have.
      write: what `read` reads back, and transformers too.
      names: parameter path to tensor name; `{}` is the layer. A `kernel` is stored transposed.
      prefix: what some checkpoints put before every name, and we leave out.
      ignored: pattern of tensors that take no part.
    """

    module: type
    read: Callable[..., Any]
    write: Callable[[Any], dict]
    names: dict[str, str]
    prefix: str
    ignored: str


def family_of(hf: dict) -> Family:
    """The family of a `config.json`.

    Raises:
      CheckpointError: a model_type there is no family for, or a quantised checkpoint.
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


def _only(hf: dict, **options) -> None:
    """Refuses options that change the function and that the network has in one form only."""
    for option, supported in options.items():
        if hf.get(option, supported) != supported:
            raise CheckpointError(
                f"config.json: {option} {hf[option]!r} is not supported; supported: {supported!r}"
            )


# --- decoders -----------------------------------------------------------------------------------


def _read_decoder(hf: dict, **own) -> DecoderConfig:
    _only(hf, hidden_act="silu", attn_logit_softcapping=None, final_logit_softcapping=None)
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


def _read_rope(hf: dict) -> tuple[float, Llama3Scaling | None]:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` (transformers before 5)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    _only(hf | rope, partial_rotary_factor=1.0)
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, Llama3Scaling(*(rope[f.name] for f in dataclasses.fields(Llama3Scaling)))
    raise CheckpointError(
        f"config.json: rope type {kind!r} is not supported; supported: 'default', 'llama3'"
    )


def _write_decoder(config: DecoderConfig, architecture: str, **own) -> dict:
    """Rope settings in both places."""
    rope = {"rope_type": "default"}
    if config.rope_scaling:
        rope = {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
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
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = hf.get("layer_types") or default
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise CheckpointError(
            f"config.json: layer_types {kinds} is not supported; supported: one of "
            f"'sliding_attention', 'full_attention' for each of {layers} layers"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _write_windows(config: DecoderConfig) -> dict:
    if not config.windows:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["sliding_attention" if w else "full_attention" for w in config.windows]
    return {
        "use_sliding_window": True,
        "sliding_window": max(config.windows),
        "max_window_layers": kinds.index("sliding_attention"),
        "layer_types": kinds,
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


# --- encoders -----------------------------------------------------------------------------------


def _read_encoder(hf: dict, sentence: dict, **own) -> EncoderConfig:
    _only(
        hf,
        hidden_act="gelu",
        is_decoder=False,
        add_cross_attention=False,
        position_embedding_type="absolute",
    )
    sentence = dict(sentence)
    longest = sentence.pop("max_length", None) or own["max_positions"]
    return EncoderConfig(
        family=hf["model_type"],
        max_length=min(longest, own["max_positions"]),
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        norm_epsilon=hf.get("layer_norm_eps", 1e-12),
        **sentence,
        **own,
    )


def _write_encoder(config: EncoderConfig, architecture: str, **own) -> dict:
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "hidden_act": "gelu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.first_position + config.max_positions,
        "layer_norm_eps": config.norm_epsilon,
    } | own


def _read_bert(hf, **sentence):
    return _read_encoder(
        hf,
        sentence,
        max_positions=hf.get("max_position_embeddings", 512),
        type_vocab_size=hf.get("type_vocab_size", 2),
    )


def _write_bert(config):
    return _write_encoder(config, "BertModel", type_vocab_size=config.type_vocab_size)


def _after_padding(hf: dict) -> dict:
    """RoBERTa and its heirs count positions from the one after `pad_token_id`."""
    first = hf.get("pad_token_id", 1) + 1
    return {"first_position": first, "max_positions": hf["max_position_embeddings"] - first}


def _read_roberta(hf, **sentence):
    own = {"type_vocab_size": hf.get("type_vocab_size", 2)} | _after_padding(hf)
    return _read_encoder({"layer_norm_eps": 1e-12} | hf, sentence, **own)


def _write_roberta(config):
    own = {"type_vocab_size": config.type_vocab_size, "pad_token_id": config.first_position - 1}
    return _write_encoder(config, "RobertaModel", **own)


def _write_xlm_roberta(config):
    return _write_roberta(config) | {"architectures": ["XLMRobertaModel"]}


def _read_mpnet(hf, **sentence):
    _only(hf, pad_token_id=1)  # from which transformers counts positions, whatever is written here
    own = {"relative_buckets": hf.get("relative_attention_num_buckets", 32), "type_vocab_size": 0}
    return _read_encoder(hf, sentence, **own, **_after_padding(hf))


def _write_mpnet(config):
    own = {
        "relative_attention_num_buckets": config.relative_buckets,
        "pad_token_id": config.first_position - 1,
    }
    return _write_encoder(config, "MPNetModel", **own)


_ENCODER_LAYER = "encoder.layer.{}."
_BERT_NAMES = {
    "embed.embedding": "embeddings.word_embeddings.weight",
    "position_embed.embedding": "embeddings.position_embeddings.weight",
    "type_embed.embedding": "embeddings.token_type_embeddings.weight",
    "embed_norm.scale": "embeddings.LayerNorm.weight",
    "embed_norm.bias": "embeddings.LayerNorm.bias",
    "layers.attention.q_proj.kernel": _ENCODER_LAYER + "attention.self.query.weight",
    "layers.attention.q_proj.bias": _ENCODER_LAYER + "attention.self.query.bias",
    "layers.attention.k_proj.kernel": _ENCODER_LAYER + "attention.self.key.weight",
    "layers.attention.k_proj.bias": _ENCODER_LAYER + "attention.self.key.bias",
    "layers.attention.v_proj.kernel": _ENCODER_LAYER + "attention.self.value.weight",
    "layers.attention.v_proj.bias": _ENCODER_LAYER + "attention.self.value.bias",
    "layers.attention.o_proj.kernel": _ENCODER_LAYER + "attention.output.dense.weight",
    "layers.attention.o_proj.bias": _ENCODER_LAYER + "attention.output.dense.bias",
    "layers.attention_norm.scale": _ENCODER_LAYER + "attention.output.LayerNorm.weight",
    "layers.attention_norm.bias": _ENCODER_LAYER + "attention.output.LayerNorm.bias",
    "layers.mlp.up_proj.kernel": _ENCODER_LAYER + "intermediate.dense.weight",
    "layers.mlp.up_proj.bias": _ENCODER_LAYER + "intermediate.dense.bias",
    "layers.mlp.down_proj.kernel": _ENCODER_LAYER + "output.dense.weight",
    "layers.mlp.down_proj.bias": _ENCODER_LAYER + "output.dense.bias",
    "layers.mlp_norm.scale": _ENCODER_LAYER + "output.LayerNorm.weight",
    "layers.mlp_norm.bias": _ENCODER_LAYER + "output.LayerNorm.bias",
}
_MPNET_NAMES = _BERT_NAMES | {
    "distance_embed.embedding": "encoder.relative_attention_bias.weight",
    "layers.attention.q_proj.kernel": _ENCODER_LAYER + "attention.attn.q.weight",
    "layers.attention.q_proj.bias": _ENCODER_LAYER + "attention.attn.q.bias",
    "layers.attention.k_proj.kernel": _ENCODER_LAYER + "attention.attn.k.weight",
    "layers.attention.k_proj.bias": _ENCODER_LAYER + "attention.attn.k.bias",
    "layers.attention.v_proj.kernel": _ENCODER_LAYER + "attention.attn.v.weight",
    "layers.attention.v_proj.bias": _ENCODER_LAYER + "attention.attn.v.bias",
    "layers.attention.o_proj.kernel": _ENCODER_LAYER + "attention.attn.o.weight",
    "layers.attention.o_proj.bias": _ENCODER_LAYER + "attention.attn.o.bias",
    "layers.attention_norm.scale": _ENCODER_LAYER + "attention.LayerNorm.weight",
    "layers.attention_norm.bias": _ENCODER_LAYER + "attention.LayerNorm.bias",
}

_ROPE = r".*\.rotary_emb\.inv_freq"
# The pooler and the heads of pre-training do not reach the token vectors.
_HEADS = r"pooler\..*|cls\..*|lm_head\..*|.*position_ids"


def encoding(family: Family) -> Family:
    """A family of decoders as encoders, whose checkpoints have no head and no prefix before names."""

    def read(hf: dict, **sentence) -> CausalEncoderConfig:
        shape = vars(family.read(hf)) | {"tie_embeddings": True}
        longest = sentence.pop("max_length") or shape["max_positions"]
        longest = min(longest, shape["max_positions"])
        return CausalEncoderConfig(**shape, max_length=longest, **sentence)

    names = {path: name.removeprefix("model.") for path, name in family.names.items()}
    names.pop("lm_head.kernel")
    ignored = rf"{_ROPE}|lm_head\..*"
    return Family(CausalEncoder, read, family.write, names, "model.", ignored)


FAMILIES = {
    "llama": Family(Decoder, _read_llama, _write_llama, _DECODER_NAMES, "", _ROPE),
    "mistral": Family(Decoder, _read_mistral, _write_mistral, _DECODER_NAMES, "", _ROPE),
    "qwen2": Family(Decoder, _read_qwen2, _write_qwen2, _DECODER_NAMES, "", _ROPE),
    "qwen3": Family(Decoder, _read_qwen3, _write_qwen3, _DECODER_NAMES, "", _ROPE),
    "bert": Family(Encoder, _read_bert, _write_bert, _BERT_NAMES, "bert.", _HEADS),
    "roberta": Family(Encoder, _read_roberta, _write_roberta, _BERT_NAMES, "roberta.", _HEADS),
    "xlm-roberta": Family(
        Encoder, _read_roberta, _write_xlm_roberta, _BERT_NAMES, "roberta.", _HEADS
    ),
    "mpnet": Family(Encoder, _read_mpnet, _write_mpnet, _MPNET_NAMES, "mpnet.", _HEADS),
}
