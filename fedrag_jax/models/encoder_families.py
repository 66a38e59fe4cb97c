"""Families of encoders: conversion between `config.json` and `EncoderConfig`, and tensor names."""

from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.family import Family, only


def _read_encoder(hf: dict, sentence: dict, **own) -> EncoderConfig:
    only(
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
    """RoBERTa and its successors count positions from `pad_token_id` + 1."""
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
    only(hf, pad_token_id=1)  # from which transformers counts positions, whatever is written here
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

# The pooler and the heads of pre-training do not reach the token vectors.
_HEADS = r"pooler\..*|cls\..*|lm_head\..*|.*position_ids"

ENCODERS = {
    "bert": Family(Encoder, _read_bert, _write_bert, _BERT_NAMES, "bert.", _HEADS),
    "roberta": Family(Encoder, _read_roberta, _write_roberta, _BERT_NAMES, "roberta.", _HEADS),
    "xlm-roberta": Family(
        Encoder, _read_roberta, _write_xlm_roberta, _BERT_NAMES, "roberta.", _HEADS
    ),
    "mpnet": Family(Encoder, _read_mpnet, _write_mpnet, _MPNET_NAMES, "mpnet.", _HEADS),
}
