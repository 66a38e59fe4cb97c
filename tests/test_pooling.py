"""From a text to its one vector as the encoder wants it: case, the last token, dense modules."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden_encoders import GOLDEN, PASSAGES, QUESTIONS, folder, plain
from tiny import random_adapters, run

from fedrag_jax.data.examples import Passage
from fedrag_jax.data.padding import encoder_table
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import hub, lora, peft, sentence_folders
from fedrag_jax.models.flops import encoder_flops
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.embedding import embed_texts
from fedrag_jax.retrieval.retriever import Retriever

pytestmark = pytest.mark.usefixtures("strict_types")


def test_texts_are_read_in_lower_case_where_the_encoder_wants_it(tmp_path):
    copy = folder(tmp_path)
    limits = json.loads((copy / sentence_folders.TEXTS).read_text())
    (copy / sentence_folders.TEXTS).write_text(json.dumps(limits | {"do_lower_case": True}))
    retriever = Retriever.build(hub.load(copy), [], query_prompt="W3 ", similarity="dot")
    np.testing.assert_allclose(retriever.embed_questions(["W8 w9"]), plain(["w3 w8 w9"]), atol=1e-5)
    np.testing.assert_allclose(
        retriever.embed_new([Passage("a", "W1", "W2")]), plain(["w1 w2"]), atol=1e-5
    )
    assert np.abs(plain(["W8 w9"]) - plain(["w8 w9"])).max() > 0.1
    hub.save(hub.load(copy), tmp_path / "saved")
    assert hub.load(tmp_path / "saved").network.config.lower_case


def test_the_last_token_may_be_the_vector(tmp_path):
    copy = folder(tmp_path)
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    model = hub.load(copy)
    texts = ["w1 w2 w3", "w4"]
    table = encoder_table(model.tokenizer, texts, 24)
    hidden = model.network(model.params, table["tokens"], table["mask"], method="hidden")
    right = [hidden[i, n - 1] for i, n in enumerate(table["mask"].sum(1))]
    length = {"max_length": 24}
    found = embed_texts(model.network, model.params, model.tokenizer, texts, **length)
    np.testing.assert_allclose(found, right, atol=1e-5)
    hub.save(model, tmp_path / "saved")
    assert hub.load(tmp_path / "saved").network.config.pooling == "lasttoken"


def with_dense(tmp_path, activation="activation.Tanh", out=6):
    """An encoder with a Dense module, and its weights."""
    copy = folder(tmp_path, similarity_fn_name="dot")
    modules = json.loads((copy / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": kind})
    (copy / "modules.json").write_text(json.dumps(modules))
    (copy / "2_Dense").mkdir()
    size = hub.load(GOLDEN / "bert_cls").network.config.hidden_size
    told = {"in_features": size, "out_features": out, "bias": True}
    told["activation_function"] = f"torch.nn.modules.{activation}"
    (copy / "2_Dense" / "config.json").write_text(json.dumps(told))
    rng = np.random.default_rng(1)
    tensors = {"linear.weight": rng.normal(size=(out, size)), "linear.bias": rng.normal(size=out)}
    tensors = {name: (x / 4).astype(np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, copy / "2_Dense" / "model.safetensors")
    return copy, tensors


@pytest.mark.parametrize(
    ("activation", "function"), [("activation.Tanh", np.tanh), ("linear.Identity", lambda x: x)]
)
def test_a_dense_module_comes_behind_the_vector(tmp_path, activation, function):
    copy, tensors = with_dense(tmp_path, activation)
    model = hub.load(copy)
    retriever = Retriever.build(model, PASSAGES)
    weight, bias = tensors["linear.weight"], tensors["linear.bias"]
    right = function(plain([p.text for p in PASSAGES]) @ weight.T + bias)
    assert retriever.vectors.shape == (60, 6)
    np.testing.assert_allclose(retriever.vectors, right, atol=1e-4)
    hub.save(model, tmp_path / "saved")
    again = hub.load(tmp_path / "saved")
    assert again.network == model.network
    np.testing.assert_array_equal(Retriever.build(again, PASSAGES).vectors, retriever.vectors)
    bare = dataclasses.replace(model.network.config, projections=())
    more = [encoder_flops(c, 8, trained=False) for c in (model.network.config, bare)]
    assert more[0] - more[1] == 2 * weight.size
    # An empty index knows the size.
    assert Retriever.build(model, []).vectors.shape == (0, 6)


def test_a_dense_module_takes_no_adapter_and_says_so(tmp_path):
    network = hub.load(with_dense(tmp_path)[0]).network
    with pytest.raises(
        ConfigError, match=r"\['projection_0'\] are not .* adapters; it has \['down"
    ):
        lora.add_lora(network, lora.LoraConfig(targets=("q_proj", "projection_0")))


def test_a_dense_module_that_does_not_fit_is_refused(tmp_path):
    copy, tensors = with_dense(tmp_path)
    weights = copy / "2_Dense" / "model.safetensors"
    safetensors.numpy.save_file({"linear.weight": tensors["linear.weight"]}, weights)
    with pytest.raises(CheckpointError, match=r"2_Dense.* holds .*asks for .*linear\.bias"):
        hub.load(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense/model\.safetensors cannot be read"):
        hub.load(copy)
    told = copy / "2_Dense" / "config.json"
    told.write_text(told.read_text().replace("Tanh", "GELU"))
    with pytest.raises(CheckpointError, match=r"activations must be among .*'Tanh'.*'GELU'"):
        hub.load(copy)


@pytest.mark.parametrize(
    ("file", "told", "error"),
    [
        (
            sentence_folders.USE,
            {"similarity_fn_name": "manhattan"},
            "similarity_fn_name 'manhattan'.*'dot'",
        ),
        (
            sentence_folders.USE,
            {"prompts": ["query: "]},
            r"prompts must be strings by their names.*query: ",
        ),
        (sentence_folders.USE, {"default_prompt_name": "x"}, "default_prompt_name 'x' is none of"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt false"),
        (sentence_folders.TEXTS, {"query_length": 32}, "query_length 32 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, file, told, error):
    path = folder(tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    with pytest.raises(CheckpointError, match=error):
        hub.load(tmp_path / "encoder")


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_decoder_that_says_so_is_an_encoder(tmp_path, name):
    """As Qwen3-Embedding and E5-Mistral are: no head, names without a prefix, the last token."""
    copy, decoder = shutil.copytree(GOLDEN / name, tmp_path / name), hub.load(GOLDEN / name)
    for shard in copy.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(shard)
        bare = {n.removeprefix("model."): x for n, x in tensors.items() if "lm_head" not in n}
        safetensors.numpy.save_file(bare, shard)
    for shards in copy.glob("*.index.json"):
        told = json.loads(shards.read_text())
        places = {n.removeprefix("model."): x for n, x in told["weight_map"].items()}
        shards.write_text(json.dumps(told | {"weight_map": places}))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"st.models.{k}"}
        for i, k in enumerate(kinds)
    ]
    (copy / "modules.json").write_text(json.dumps(modules))
    (copy / "1_Pooling").mkdir()
    pooling = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (copy / sentence_folders.USE).write_text(
        json.dumps({"prompts": {"query": "w3 w4", "document": ""}})
    )
    (copy / sentence_folders.TEXTS).write_text(json.dumps({"max_seq_length": 20}))
    model = hub.load(copy)
    assert (model.kind, decoder.kind) == ("encoder", "decoder")
    retriever = Retriever.build(model, PASSAGES[:8])

    texts = [p.text for p in PASSAGES[:8]] + ["w3 w4" + q for q in QUESTIONS[:3]]
    table = encoder_table(model.tokenizer, texts, 20)
    places = np.broadcast_to(np.arange(table["tokens"].shape[1]), table["tokens"].shape)
    hidden = run(decoder.network, decoder.params, table["tokens"], places, table["mask"])
    last = np.asarray(hidden)[np.arange(len(texts)), table["mask"].sum(1) - 1]
    right = last / np.linalg.norm(last, axis=1, keepdims=True)
    np.testing.assert_allclose(retriever.vectors, right[:8], atol=1e-5)
    asked = retriever.embed_questions(QUESTIONS[:3])
    np.testing.assert_allclose(asked, right[8:], atol=1e-5)
    hub.save(model, tmp_path / "saved")
    again = hub.load(tmp_path / "saved")
    assert again.network == model.network
    vectors = Retriever.build(again, PASSAGES[:8]).vectors
    np.testing.assert_array_equal(vectors, retriever.vectors)
    with pytest.raises(ConfigError, match=r"models\.generator must be a decoder; .* is an encoder"):
        RAGSystem.build(PASSAGES, generator=str(copy))


def test_adapters_beside_a_dense_module_are_saved(tmp_path):
    copy, _ = with_dense(tmp_path)
    network = lora.add_lora(hub.load(copy).network, lora.LoraConfig(2, targets=("up_proj",)))
    adapters = random_adapters(network, 0)
    peft.save(adapters, network, tmp_path / "adapters")
    again, loaded = peft.load(hub.load(copy).network, tmp_path / "adapters")
    assert again == network
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
