"""Adapters of encoders in PEFT's format: their names, with and without a head."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_peft import DECODER, GOLDEN, PATTERNS, adapted

from fedrag_jax.models import hub, peft


def as_encoder(name, tmp_path):
    """A folder of a decoder that is used as an encoder: the mean of its states, normalised."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    copy = shutil.copytree(GOLDEN / name, tmp_path / "encoder")
    shutil.copytree(GOLDEN / "bert_mean" / "1_Pooling", copy / "1_Pooling")
    modules = [{"path": path, "type": f"st.models.{kind}"} for path, kind in kinds.items()]
    (copy / "modules.json").write_text(json.dumps(modules))
    return copy


def test_adapters_of_a_decoder_as_an_encoder_have_the_names_of_its_checkpoint(tmp_path):
    model, network, adapters = adapted(as_encoder("qwen3", tmp_path), DECODER, PATTERNS)
    peft.save(adapters, network, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / peft.TENSORS)
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert not [name for name in tensors if ".model.model." in name]
    _, loaded = peft.load(model.network, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


@pytest.mark.parametrize(
    ("name", "prefix"), [("qwen3", "model."), ("bert_mean", "bert."), ("roberta", "roberta.")]
)
def test_names_of_a_model_with_a_head_are_read(name, prefix, tmp_path):
    path = as_encoder(name, tmp_path) if name == "qwen3" else name
    model, network, adapters = adapted(path, ("q_proj", "down_proj", "o_proj"), PATTERNS)
    peft.save(adapters, network, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / peft.TENSORS)
    renamed = {n.replace(".model.", f".model.{prefix}", 1): x for n, x in tensors.items()}
    safetensors.numpy.save_file(renamed, tmp_path / peft.TENSORS)
    _, loaded = peft.load(model.network, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def assert_same_vectors(theirs, model, network, adapters, torch):
    tokens, mask = np.arange(3, 13)[None], np.ones((1, 10), bool)
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor(tokens)).last_hidden_state.numpy().mean(1)
    ours = network(model.params, tokens, mask, adapters=adapters)
    np.testing.assert_allclose(ours, hidden / np.linalg.norm(hidden), atol=1e-5)
    assert np.abs(ours - model.network(model.params, tokens, mask)).max() > 0.1


@pytest.mark.parametrize(("name", "targets"), [("qwen3", DECODER), ("bert_mean", ("down_proj",))])
def test_peft_opens_what_we_save_of_encoders(name, targets, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    reference = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    path = as_encoder(name, tmp_path) if name == "qwen3" else GOLDEN / name
    model, network, adapters = adapted(path, targets)
    peft.save(adapters, network, tmp_path)
    base = transformers.AutoModel.from_pretrained(path)
    theirs = reference.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same_vectors(theirs, model, network, adapters, torch)

    theirs.save_pretrained(tmp_path / "theirs")
    _, loaded = peft.load(model.network, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "dense"]])
def test_we_open_what_peft_saves_of_encoders(targets, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    reference = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    base = transformers.AutoModel.from_pretrained(GOLDEN / "bert_mean")
    config = reference.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    theirs = reference.get_peft_model(base, config).eval()
    for name, x in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = hub.load(GOLDEN / "bert_mean")
    network, adapters = peft.load(model.network, tmp_path)
    assert_same_vectors(theirs, model, network, adapters, torch)
