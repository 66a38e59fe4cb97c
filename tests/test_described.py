"""Models that are described and not loaded make the programs that loaded ones make."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small
from tiny import TINY_ENCODER

from experiments.benchmarks import compile_for
from experiments.benchmarks.chips import CHIPS
from experiments.benchmarks.compiling import Report
from experiments.benchmarks.described_lab import DescribedLab
from experiments.benchmarks.hlo import Sent
from experiments.lab import Lab
from experiments.loading import load_data
from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.federated.engine.round import Program
from fedrag_jax.federated.fit import fit
from fedrag_jax.models import fetching, hub, shapes
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.network import Network, flatten
from fedrag_jax.retrieval.embedding import embed_texts
from fedrag_jax.strategies.own import named

BUILTIN = "builtin:decoder", "builtin:encoder", "builtin:citing"


def sizes(tree):
    return {path: (x.shape, x.dtype) for path, x in flatten(tree)}


@pytest.mark.parametrize("name", BUILTIN)
def test_a_description_has_the_shapes_of_the_model(name):
    loaded, described = (read(name, jnp.bfloat16) for read in (hub.load, hub.describe))
    assert sizes(described.params) == sizes(loaded.params)
    assert (described.network, described.ends) == (loaded.network, loaded.ends)
    assert shapes.shapes_alone(described.params) and not shapes.shapes_alone(loaded.params)
    assert described.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_config_json_is_enough_for_a_description(tmp_path):
    about = {
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(about))
    words = hub.load("builtin:decoder").tokenizer
    described = hub.describe(tmp_path, tokenizer=words)
    assert described.params["layers"]["mlp"]["gate_proj"]["kernel"].shape == (2, 64, 96)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        hub.describe(tmp_path)


def test_what_is_asked_of_shapes_is_zero():
    network = Network.of(Encoder, TINY_ENCODER)
    program = jax.jit(lambda network, params, x: network(params, x, x > 0), static_argnums=0)
    tokens = np.ones((3, 5), np.int32)
    found = shapes.ask(program, network, network.shapes(), tokens)
    assert found.shape == (3, 16) and not found.any()
    params = network.init(jax.random.key(0))
    np.testing.assert_array_equal(
        shapes.ask(program, network, params, tokens), program(network, params, tokens)
    )
    words = hub.load("builtin:encoder").tokenizer
    embedded = embed_texts(network, network.shapes(), words, ["a", "b"], max_length=8)
    assert embedded.shape == (2, 16) and not embedded.any()


def test_an_experiment_asks_for_the_same_round_of_a_description(tmp_path):
    config = small()
    config.strategies, config.regimes = ("joint_token",), ("federated",)
    dataset, row = load_data(config), named("joint_token")
    described = DescribedLab(config, dataset, tmp_path / "described", jax.devices()[:1])
    (task,) = described.tasks(row)
    one = described.asked_round(row, task, "federated")
    loaded = Lab(config, dataset, tmp_path / "loaded")
    task = next(row.tasks(loaded.system(0), dataset))
    tuner = loaded.tuner(lambda name, part: loaded.rate("federated", row, part), "federated", 0, 0)
    other = next(fit.rounds(**tuner.arguments(task) | {"callbacks": ()}))
    assert all_but_places(one) == all_but_places(other)


def all_but_places(asked) -> tuple:
    """Of the program of a round what makes it another one."""
    p, _ = Program.of(asked)
    leaves = [(x.shape, x.dtype, x.weak_type) for x in p.shapes]
    return p.loss, p.turn, p.fixed, p.structure, p.tree, leaves


def test_a_group_size_is_not_measured_without_a_device(tmp_path):
    config = small()
    config.strategies, config.regimes = ("retriever",), ("federated",)
    config.training.group_size = 0
    lab = DescribedLab(config, load_data(config), tmp_path, jax.devices())
    with pytest.raises(ConfigError, match=r"training.group_size is 0, which measures"):
        next(lab.rounds())


def test_the_report_says_what_decides():
    chip = CHIPS["TPU v5 lite"]
    common = {"chip": chip, "compile_seconds": 2.0, "operations": 197e12}
    fits = Report(
        "round", True, peak=5e9, moved=819e6, sent={"all-gather": Sent(2, 10)}, useful=98.5e12, **common
    )  # fmt: skip
    large = Report("prefill", False, peak=20e9, **common)
    told = compile_for.summary([fits, large])
    decisive = {k: told[k] for k in ("fits", "peak_gb", "all_gathers", "roofline_mfu")}
    assert decisive == {"fits": False, "peak_gb": 20.0, "all_gathers": 2, "roofline_mfu": 0.5}
    json.dumps(told)
    rows = compile_for.table([fits, large]).splitlines()
    assert "2 all-gather: 1e-05" in rows[2] and "products" in rows[2]
    assert " NO " in rows[3] and "20.000" in rows[3]


def test_of_a_described_model_of_the_hub_the_weights_stay_there(monkeypatch, tmp_path):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for weights in (True, False):
        fetching.place_of("owner/name", weights)
    whole, bare = map(set, asked)
    assert whole - bare == {"*.safetensors"} and "*.json" in bare
