"""Adapters in PEFT's own format: whole, refused by name, and opened by PEFT itself."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub, lora, peft

GOLDEN = pathlib.Path(__file__).parent / "golden"
DECODER = ("q_proj", "o_proj", "down_proj")


def adapted(name, targets):
    """A network that takes adapters, its base, and adapters whose B is not zero."""
    model = hub.load(GOLDEN / name)
    network = lora.add_lora(model.network, lora.LoraConfig(3, 5.0, targets))
    leaves, tree = jax.tree.flatten(lora.init_adapters(network, 0))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return model, network, jax.tree.unflatten(tree, noise)


CASES = [
    ("qwen3", DECODER),
    ("llama_gqa", (*DECODER, "lm_head")),
    ("bert_mean", ("v_proj", "o_proj", "up_proj", "down_proj")),
    ("mpnet", ("k_proj",)),
]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_saved_and_loaded_again_is_the_same(name, targets, tmp_path):
    model, network, adapters = adapted(name, targets)
    peft.save(adapters, network, tmp_path)
    again, loaded = peft.load(model.network, tmp_path)
    assert (again.lora.rank, again.lora.alpha, set(again.lora.targets)) == (3, 5.0, set(targets))
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


@pytest.mark.parametrize("name", ["qwen3", "llama_gqa"])
def test_peft_opens_what_we_save(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    reference = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    model, network, adapters = adapted(name, DECODER)
    peft.save(adapters, network, tmp_path)
    golden = np.load(GOLDEN / f"{name}.npz")
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    hidden = network(model.params, *inputs, adapters=adapters)
    ours = network(model.params, hidden, method="logits", adapters=adapters)

    base = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation="eager"
    )
    theirs = reference.PeftModel.from_pretrained(base, tmp_path).eval()
    names = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions"}
    with torch.no_grad():
        out = theirs(**{k: torch.tensor(golden[v].astype(np.int64)) for k, v in names.items()})
    real = golden["mask"]
    np.testing.assert_allclose(ours[real], out.logits.numpy()[real], atol=1e-4)
    assert np.abs(out.logits.numpy() - golden["logits"])[real].max() > 0.1

    theirs.save_pretrained(tmp_path / "theirs")
    _, loaded = peft.load(model.network, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model, network, adapters = adapted("qwen3", DECODER)
    with pytest.raises(CheckpointError, match=r"no PEFT adapter.*adapter_config.json"):
        peft.load(model.network, tmp_path)
    peft.save(adapters, network, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no matrix of .*query.*self_attn.q_proj"):
        peft.load(hub.load(GOLDEN / "bert_mean").network, tmp_path)

    file = tmp_path / peft.TENSORS
    tensors = safetensors.numpy.load_file(file)
    first, second, *_ = sorted(tensors)
    tensors[first], tensors["stray"] = np.zeros((2, 2), np.float32), np.zeros(1, np.float32)
    del tensors[second]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        peft.load(model.network, tmp_path)
    for words in (f"{first} has shape (2, 2)", f"missing {second}", "unexpected stray"):
        assert words in str(caught.value)

    config = tmp_path / peft.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora True is not supported"):
        peft.load(model.network, tmp_path)
