"""GGUF files as llama.cpp's converter writes them, of Hugging Face folders, and text to split."""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES |= {"gemma3_text": "gemma3"}


def write(folder: pathlib.Path, path: pathlib.Path, kind: str = "F32", **changes) -> None:
    """Writes a folder's model and tokenizer.

    Args:
      kind: how matrices are stored, by the library's name; norms and biases are F32 as in llama.cpp.
      changes: metadata to add or to replace.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    name = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, name)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    if family in ("mistral", "gemma3_text") and config["sliding_window"]:
        values["attention.sliding_window"] = config["sliding_window"]
    for key, value in values.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_float32(f"{name}.rope.freq_base", rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_string(f"{name}.rope.scaling.type", "linear")
        writer.add_float32(f"{name}.rope.scaling.factor", rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config["head_dim"]))
    add_tokenizer(writer, folder, changes)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"])
    for stored, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        if name == "llama" and ("q_proj" in stored or "k_proj" in stored):
            count = heads if "q_proj" in stored else kv
            array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2)
            array = np.ascontiguousarray(array.reshape(-1, *array.shape[3:]))
        if name == "gemma3" and stored.endswith("norm.weight"):
            array = array + 1
        there = table.get_name(stored, try_suffixes=(".weight", ".bias"))
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(there, array)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(there, quantise(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """By how much each frequency is divided, one by one as llama.cpp's converter does it."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        positions = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wave < positions / high:
            factors.append(1.0)
        elif wave > positions / low:
            factors.append(rope["factor"])
        else:
            smooth = (positions / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def add_tokenizer(writer, folder: pathlib.Path, changes: dict) -> None:
    """Vocabulary, kinds of tokens, merges or scores, special tokens and template, of tokenizer.json."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {one["content"]: 3 if one["special"] else 4 for one in told["added_tokens"]}
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in told["model"].get("merges", [])],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    } | changes
    for key, value in values.items():
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)


def quantise(array: np.ndarray, kind) -> np.ndarray:
    """A matrix in blocks; Q4_K, which the library only widens, is done here."""
    if kind.name == "Q4_K":
        return _q4_k(array)
    return gguf.quants.quantize(array, kind)


def _q4_k(array: np.ndarray) -> np.ndarray:
    """Blocks of 256 in 8 parts: x = d scale q - dmin min; q has 4 bits, scale and min have 6."""
    parts = array.reshape(-1, 8, 32).astype(np.float32)
    low = np.maximum(-parts.min(-1), 0)
    step = np.maximum(parts.max(-1) + low, 1e-9) / 15
    d = (step.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = (np.maximum(low.max(-1, keepdims=True), 1e-9) / 63).astype(np.float16)
    scale = np.clip(np.round(step / d), 0, 63).astype(np.uint8)
    least = np.clip(np.round(low / dmin), 0, 63).astype(np.uint8)
    width = np.maximum(d.astype(np.float32) * scale, 1e-12)
    q = np.round((parts + (dmin.astype(np.float32) * least)[..., None]) / width[..., None])
    q = np.clip(q, 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            least[:, :4] | (least[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | (least[:, 4:] & 15) << 4,
        ],
        axis=-1,
    )
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(q), -1)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=-1)
    return blocks.reshape(len(array), -1)


def lines(special: list[str], count: int = 1000) -> list[str]:
    """Digits, code, accents, CJK, emoji, runs of spaces, special tokens; mixed by a seed."""
    rng = np.random.default_rng(0)
    pieces = [
        "The quick brown fox", "federated learning", "isn't", "WE'LL", "they're", "1", "42", "2026",
        "3.14159", "1,000,000", "0x1F", "def f(x):\n\treturn x ** 2", "for (int i = 0; i < n; ++i) {",
        "<html><body>", "a_b-c/d\\e", "São Paulo", "Zoë", "naïve café", "über", "e\u0301te\u0301",
        "Ångström", "東京は日本の首都です。", "联邦学习", "한국어", "Привет, мир", "العربية", "हिन्दी",
        "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "...",
        "!!!", "—", "“quoted”", "½", "²", "ﬁ", "\u00a0", "\u200b", "٣", "https://example.org/?q=1&r=%20",
        "$E=mc^2$", "A", "the", "'s", " 's", "x" * 30, *special,
    ]  # fmt: skip
    made = []
    for _ in range(count):
        chosen = rng.choice(len(pieces), size=rng.integers(1, 8))
        made.append(str(rng.choice(["", " ", "  "])).join(pieces[i] for i in chosen))
    return made
