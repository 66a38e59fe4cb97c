"""Adapters in PEFT's own format: whole, refused by name, and opened by PEFT itself."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.models import hub, lora, peft

GOLDEN = pathlib.Path(__file__).parent / "golden"
DECODER = ("q_proj", "o_proj", "down_proj")


PATTERNS = ((r"layers\.1\.q_proj", 5, 20.0), (".*down_proj", 2, 5.0))


def adapted(name, targets, patterns=()):
    """A network that takes adapters, its base, and adapters whose B is not zero."""
    model = hub.load(GOLDEN / name)
    network = lora.add_lora(model.network, lora.LoraConfig(3, 5.0, targets, patterns))
    rng = np.random.default_rng(0)

    def noise(path, x):
        path = [key.key for key in path]
        noise = 0.3 * rng.normal(size=x.shape).astype(np.float32)
        sizes = network.lora.sizes(path[-2], len(x) if path[0] == "layers" else None)
        for layer, (rank, _) in zip(noise if path[0] == "layers" else [noise], sizes, strict=True):
            (layer.T if path[-1] == "lora_a" else layer)[rank:] = 0
        return noise

    return model, network, jax.tree.map_with_path(noise, lora.init_adapters(network, 0))


CASES = [
    ("qwen3", DECODER),
    ("llama_gqa", (*DECODER, "lm_head")),
    ("bert_mean", ("v_proj", "o_proj", "up_proj", "down_proj")),
    ("bert_mean", ("down_proj",)),  # its name also ends that of o_proj
    ("mpnet", ("k_proj",)),
]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_saved_and_loaded_again_is_the_same(name, targets, tmp_path):
    model, network, adapters = adapted(name, targets)
    peft.save(adapters, network, tmp_path)
    again, loaded = peft.load(model.network, tmp_path)
    assert (again.lora.rank, again.lora.alpha, set(again.lora.targets)) == (3, 5.0, set(targets))
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_patterns_are_saved_layer_by_layer(tmp_path):
    model, network, adapters = adapted("qwen3", DECODER, PATTERNS)
    peft.save(adapters, network, tmp_path)
    about = json.loads((tmp_path / peft.CONFIG).read_text())
    layers = range(network.config.num_layers)
    assert about["rank_pattern"] == {
        "model.layers.1.self_attn.q_proj": 5,
        **{f"model.layers.{i}.mlp.down_proj": 2 for i in layers},
    }
    assert about["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 20.0}
    tensors = safetensors.numpy.load_file(tmp_path / peft.TENSORS)
    ranks = [tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight"].shape[0]
             for i in layers]  # fmt: skip
    assert ranks == [5 if i == 1 else 3 for i in layers]
    again, loaded = peft.load(model.network, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    for name in DECODER:
        assert again.lora.sizes(name, len(layers)) == network.lora.sizes(name, len(layers))


@pytest.mark.parametrize("targets", [DECODER, ("lm_head",)], ids="-".join)
def test_clients_lie_side_by_side_in_one_file(targets, tmp_path):
    model, network, one = adapted("llama_gqa", targets, PATTERNS if len(targets) > 1 else ())
    clients = jax.tree.map(lambda x: np.stack([x, 2 * x, 0 * x, -x]), one)
    peft.save(clients, network, tmp_path / "all")
    peft.save(one, network, tmp_path / "one")
    size, alone = ((tmp_path / n / peft.TENSORS).stat().st_size for n in ("all", "one"))
    assert size < 4 * alone
    _, loaded = peft.load(model.network, tmp_path / "all")
    jax.tree.map(np.testing.assert_array_equal, loaded, clients)
    again, third = peft.load(model.network, tmp_path / "all", client=3)
    jax.tree.map(np.testing.assert_array_equal, third, jax.tree.map(np.negative, one))
    assert again.lora.sizes(targets[0], 2) == network.lora.sizes(targets[0], 2)

    peft.save(clients, network, tmp_path / "half", dtype="float16")
    assert (tmp_path / "half" / peft.TENSORS).stat().st_size < 0.6 * size
    _, half = peft.load(model.network, tmp_path / "half", client=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-3, atol=1e-6), half, one)


def test_clients_that_are_not_there_are_refused(tmp_path):
    model, network, one = adapted("llama_gqa", DECODER)
    clients = jax.tree.map(lambda x: np.stack([x, x]), one)
    for adapters, client, words in ((clients, 2, "of 2 clients, not 2"), (one, 0, "of no clients")):
        peft.save(adapters, network, tmp_path)
        with pytest.raises(CheckpointError, match=words):
            peft.load(model.network, tmp_path, client=client)
    large = jax.tree.map(lambda x: 1e6 * x, one)
    with pytest.raises(CheckpointError, match=r"lora_a is not finite as float16; nothing"):
        peft.save(large, network, tmp_path / "large", dtype="float16")
    assert not (tmp_path / "large").exists()
    with pytest.raises(CheckpointError, match="got 'int8'"):
        peft.save(one, network, tmp_path, dtype="int8")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("patterns", [(), PATTERNS], ids=["one size", "patterns"])
@pytest.mark.parametrize(
    ("name", "targets"), [("qwen3", DECODER), ("llama_gqa", (*DECODER, "lm_head"))]
)
def test_peft_opens_what_we_save(name, targets, patterns, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    reference = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    model, network, adapters = adapted(name, targets, patterns)
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
    with pytest.raises(CheckpointError, match=r"not a PEFT adapter.*adapter_config.json"):
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


def told(folder, **options):
    """Has the adapter_config.json of a folder say more."""
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[
            ("init_lora_weights", how)
            for how in (
                "pissa",
                "pissa_niter_4",
                "olora",
                "loftq",
                "corda",
                "eva",
                "lora_ga",
                "new",
            )
        ],
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_rslora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("target_parameters", ["mlp.down_proj.weight"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("kasa_config", {"beta": 1.0}),
        ("what_comes_next", "year"),
    ],
)
def test_what_computes_something_else_is_refused_by_name(option, value, tmp_path):
    model, network, adapters = adapted("qwen3", DECODER)
    peft.save(adapters, network, tmp_path)
    told(tmp_path, **{option: value})
    words = re.escape(f"{peft.CONFIG}: {option} {value!r} is not supported")
    with pytest.raises(CheckpointError, match=words):
        peft.load(model.network, tmp_path)


def test_what_leaves_the_base_alone_is_read(tmp_path):
    """Among others all options that PEFT 0.21 writes for a plain adapter."""
    model, network, adapters = adapted("qwen3", DECODER)
    peft.save(adapters, network, tmp_path)
    for how in (True, False, "gaussian", "orthogonal"):
        told(
            tmp_path, init_lora_weights=how, alora_invocation_tokens=None, arrow_config=None,
            corda_config=None, ensure_weight_tying=False, eva_config=None, exclude_modules=None,
            layers_pattern=None, layers_to_transform=None, loftq_config={}, lora_bias=False,
            megatron_config=None, megatron_core="megatron.core", modules_to_save=None,
            peft_version="0.21.2", qalora_group_size=16, revision="main", target_parameters=None,
            trainable_token_indices=None, use_bdlora=None, use_dora=False, use_qalora=False,
        )  # fmt: skip
        _, loaded = peft.load(model.network, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


# What PEFT adapts of three layers: (options, the layers of q_proj, those of down_proj).
CHOICES = [
    ({"layers_to_transform": [0, 2]}, [0, 2], [0, 2]),
    ({"layers_to_transform": 1, "layers_pattern": "layers"}, [1], [1]),
    ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, [1], [1]),
    ({"exclude_modules": ["layers.0.mlp.down_proj"]}, [0, 1, 2], [1, 2]),
    ({"exclude_modules": r".*\.[01]\.mlp\..*"}, [0, 1, 2], [2]),
    ({"target_modules": r".*\.(0|2)\..*q_proj|.*\.1\.mlp\.down_proj"}, [0, 2], [1]),
    ({"target_modules": ["layers.2.self_attn.q_proj", "down_proj"]}, [2], [0, 1, 2]),
    ({"target_modules": None}, [0, 1, 2], [0]),
]


@pytest.mark.parametrize(("options", "queries", "downs"), CHOICES)
def test_layers_without_an_adapter_stay_as_they_are(options, queries, downs, tmp_path):
    model, network, adapters = adapted("qwen2", ("q_proj", "down_proj"))
    peft.save(adapters, network, tmp_path)
    told(tmp_path, **options)
    file = tmp_path / peft.TENSORS
    kept = {"q_proj": queries, "down_proj": downs}
    tensors = {
        name: tensor
        for name, tensor in safetensors.numpy.load_file(file).items()
        if int(name.split(".layers.")[1].split(".")[0]) in kept[name.split(".")[-3]]
    }
    safetensors.numpy.save_file(tensors, file)
    again, loaded = peft.load(model.network, tmp_path)
    for part, name in (("attention", "q_proj"), ("mlp", "down_proj")):
        for matrix in ("lora_a", "lora_b"):
            there = np.array([i in kept[name] for i in range(3)])[:, None, None]
            expected = adapters["layers"][part][name][matrix] * there
            np.testing.assert_array_equal(loaded["layers"][part][name][matrix], expected)
    assert again.lora.targets == ("down_proj", "q_proj")


ENCODER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
POOLER = {"pooler.dense.lora_A.weight": (3, 32), "pooler.dense.lora_B.weight": (32, 3)}


@pytest.mark.parametrize(
    ("name", "targets", "said", "more"),
    [
        ("bert_mean", ENCODER, "all-linear", POOLER),
        ("bert_mean", ("q_proj", "o_proj", "up_proj", "down_proj"), ["query", "dense"], POOLER),
        ("llama_gqa", ("lm_head",), ["lm_head"], {"lm_head.base_layer.weight": (64, 32)}),
    ],
)
def test_matrices_of_peft_that_change_nothing_here_are_left_out(
    name, targets, said, more, tmp_path
):
    model, network, adapters = adapted(name, targets)
    peft.save(adapters, network, tmp_path)
    told(tmp_path, target_modules=said)
    tensors = safetensors.numpy.load_file(tmp_path / peft.TENSORS)
    ones = {f"base_model.model.{part}": np.ones(shape, np.float32) for part, shape in more.items()}
    safetensors.numpy.save_file(tensors | ones, tmp_path / peft.TENSORS)
    _, loaded = peft.load(model.network, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_a_matrix_of_a_layer_that_is_not_transformed_is_told(tmp_path):
    model, network, adapters = adapted("qwen2", ("q_proj", "down_proj"))
    peft.save(adapters, network, tmp_path)
    told(tmp_path, layers_to_transform=[0, 1])
    with pytest.raises(CheckpointError, match=r"unexpected .*layers.2.mlp.down_proj.lora_A"):
        peft.load(model.network, tmp_path)
    told(tmp_path, layers_to_transform=None, target_modules="(")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is malformed"):
        peft.load(model.network, tmp_path)


@pytest.mark.parametrize("options", [options for options, *_ in CHOICES[:-1]], ids=str)
def test_we_open_what_peft_saves(options, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    reference = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "qwen2", attn_implementation="eager"
    )
    options = {"target_modules": ["q_proj", "down_proj"]} | options
    config = reference.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    theirs = reference.get_peft_model(base, config).eval()
    for name, x in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.3)
    theirs.save_pretrained(tmp_path)
    golden, model = np.load(GOLDEN / "qwen2.npz"), hub.load(GOLDEN / "qwen2")
    network, adapters = peft.load(model.network, tmp_path)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    hidden = network(model.params, *inputs, adapters=adapters)
    ours = network(model.params, hidden, method="logits", adapters=adapters)
    names = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions"}
    with torch.no_grad():
        out = theirs(**{k: torch.tensor(golden[v].astype(np.int64)) for k, v in names.items()})
    real = golden["mask"]
    np.testing.assert_allclose(ours[real], out.logits.numpy()[real], atol=1e-4)
    assert np.abs(out.logits.numpy() - golden["logits"])[real].max() > 0.01
