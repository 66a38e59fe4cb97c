"""Networks against transformers (golden files, see golden/make_goldens.py)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, TINY_ENCODER, logits, run, tiny_inputs

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.generation import decoding
from fedrag_jax.models import hub
from fedrag_jax.models.decoder import Decoder
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.families import FAMILIES
from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
from fedrag_jax.models.network import Network
from fedrag_jax.models.rotary import Llama3Scaling, rope_frequencies

pytestmark = pytest.mark.usefixtures("strict_types")

GOLDEN = pathlib.Path(__file__).parent / "golden"

# --- decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama_gqa", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3", "gemma3"]
)
def test_decoder_agrees_with_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), hub.load(GOLDEN / name)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    ours = logits(model.network, model.params, *inputs)
    assert ours.dtype == jnp.float32
    real = golden["mask"]
    np.testing.assert_allclose(ours[real], golden["logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "gemma3"])
def test_layers_by_themselves_are_the_stack(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), hub.load(GOLDEN / name)
    network = add_lora(model.network, LoraConfig(2, 4.0, patterns=((r"layers\.0\..*", 3, 9.0),)))
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(network, 0))
    params, inputs = model.params, [golden[n] for n in ("tokens", "positions", "mask")]
    rows, width = golden["tokens"].shape
    before, after = ([x[:, part] for x in inputs] for part in (slice(4), slice(4, None)))
    _, cache = network(params, *before, room=width, adapters=adapters)
    apart, beside = decoding.weights_apart(params, adapters)
    single = decoding.cache_apart(cache)
    hidden, whole = run(network, params, *after, cache=cache, adapters=adapters)
    again, parted = run(network, apart, *after, cache=single, adapters=beside)
    np.testing.assert_allclose(again, hidden, atol=1e-5)
    keys = jnp.stack(parted.keys.layers).reshape(whole.keys.shape)
    np.testing.assert_allclose(keys, whole.keys, atol=1e-5)
    read = jnp.array([[0, 5]] * rows)
    some, made = network(apart, *inputs, read=read, room=width, adapters=beside)
    everything = run(network, params, *inputs, adapters=adapters)
    np.testing.assert_allclose(some, everything[:, [0, 5]], atol=1e-5)
    real = golden["mask"]
    np.testing.assert_allclose(made.values[:, :, real], whole.values[:, :, real], atol=1e-5)


def test_golden_positions_are_far_enough_for_rope_scaling_to_matter():
    golden, model = np.load(GOLDEN / "llama_gqa.npz"), hub.load(GOLDEN / "llama_gqa")
    config = dataclasses.replace(model.network.config, rope_scaling=None)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    unscaled = logits(Network.of(Decoder, config), model.params, *inputs)
    assert np.abs(unscaled - golden["logits"])[golden["mask"]].max() > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "silu"},
        {"embed_scale": 1.0},
        {"attention_scale": None},
        {"centred_norms": False},
        {"local_rope_theta": 1e6},
        {"rope_scaling": None},
        {"windows": (5, 5, 5, 5)},
    ],
)
def test_every_part_of_gemma_shows_in_its_golden(change):
    golden, model = np.load(GOLDEN / "gemma3.npz"), hub.load(GOLDEN / "gemma3")
    config = dataclasses.replace(model.network.config, **change)
    assert golden["tokens"].shape[1] > 2 * max(config.windows)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    other = logits(Network.of(Decoder, config), model.params, *inputs)
    assert np.abs(other - golden["logits"])[golden["mask"]].max() > 1e-2


def test_gemma_that_looks_both_ways_is_refused():
    hf = FAMILIES["gemma3_text"].write(hub.load(GOLDEN / "gemma3").network.config)
    with pytest.raises(CheckpointError, match=r"use_bidirectional_attention True.*False"):
        FAMILIES["gemma3_text"].read(hf | {"use_bidirectional_attention": True})


def test_settings_of_older_gemma_files_are_read():
    model = hub.load(GOLDEN / "gemma3")
    hf = FAMILIES["gemma3_text"].write(model.network.config)
    del hf["rope_parameters"], hf["layer_types"]
    older = hf | {"sliding_window_pattern": 3}
    assert FAMILIES["gemma3_text"].read(older) == model.network.config


@pytest.mark.parametrize(("name", "change"), [("mistral", {}), ("qwen2", {"windows": (7, 7, 7)})])
def test_golden_sequences_are_long_enough_for_windows_to_matter(name, change):
    golden, model = np.load(GOLDEN / f"{name}.npz"), hub.load(GOLDEN / name)
    config = dataclasses.replace(model.network.config, **{"windows": ()} | change)
    assert golden["tokens"].shape[1] > 2 * max(model.network.config.windows)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    other = logits(Network.of(Decoder, config), model.params, *inputs)
    assert np.abs(other - golden["logits"])[golden["mask"]].max() > 0.1


def test_rope_frequencies_keep_short_and_stretch_long_waves():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    config = dataclasses.replace(TINY, head_dim=64, rope_scaling=scaling)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio, turns = rope_frequencies(config) / plain, 64 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()


def test_a_token_sees_nothing_after_it_and_no_padding(tiny):
    network, params = tiny
    tokens, positions, mask = tiny_inputs()
    base = run(network, params, tokens, positions, mask)
    later = run(network, params, tokens.at[:, 4].add(1), positions, mask)
    np.testing.assert_array_equal(base[:, :4], later[:, :4])
    assert (jnp.abs(base - later)[:, 4:].max((0, 2)) > 1e-3).all()
    mask = mask.at[:, 2].set(False)
    hidden = run(network, params, tokens, positions, mask)
    changed = run(network, params, tokens.at[:, 2].add(1), positions, mask)
    others = jnp.array([0, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(hidden[:, others], changed[:, others])


@pytest.mark.parametrize("change", [{}, {"windows": (0, 3, 0)}, {"qk_norm": True, "o_bias": True}])
def test_cache_in_pieces_equals_one_pass(change):
    network = Network.of(Decoder, dataclasses.replace(TINY, **change))
    params = network.init(jax.random.key(0))
    tokens, positions, mask = tiny_inputs()
    mask = mask.at[0, :2].set(False)
    hidden, cache = network(params, tokens[:, :4], positions[:, :4], mask[:, :4], room=9)
    parts = [hidden]
    for piece in (slice(4, 5), slice(5, 7)):
        inputs = (x[:, piece] for x in (tokens, positions, mask))
        hidden, cache = run(network, params, *inputs, cache=cache)
        parts.append(hidden)
    whole = run(network, params, tokens, positions, mask)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[mask], whole[mask], atol=1e-5)
    assert cache.length == 7


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"unroll": True}, {"remat": "none"}, {"num_layers": 1}])
def test_reading_some_places_gives_what_reading_all_gives_there(change):
    network = Network.of(Decoder, dataclasses.replace(TINY, **change))
    params = network.init(jax.random.key(0))
    tokens, positions, mask = tiny_inputs()
    mask = mask.at[0, :2].set(False)
    places = jnp.array([[6, 2, 2], [3, 0, 6]])
    rows = jnp.arange(2)[:, None]

    def some(params):
        return network(params, tokens, positions, mask, read=places)

    def all_of_them(params):
        return network(params, tokens, positions, mask)[rows, places]

    values, gradients = [], []
    for read_from in (some, all_of_them):
        values.append(jax.jit(read_from)(params))
        gradients.append(jax.jit(jax.grad(lambda p, f=read_from: f(p).var()))(params))
    np.testing.assert_allclose(*values, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *gradients)


@pytest.mark.parametrize(
    "change",
    [{"unroll": True}, {"remat": "full"}, {"remat": "none"}, {"unroll": True, "remat": "none"}],
)
def test_unroll_and_remat_change_no_number(tiny, change):
    network, params = tiny
    other = Network.of(Decoder, dataclasses.replace(TINY, **change))

    def loss(params, network):
        return logits(network, params, *tiny_inputs()).var()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected, got = (gradient(params, n) for n in (network, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, got)


def test_selective_remat_keeps_linear_layers_and_no_attention():
    """Memory of the backward pass between that of keeping all and that of keeping nothing."""
    deep = dataclasses.replace(TINY, num_layers=8)
    tokens = jnp.zeros((2, 64), int)
    positions = jnp.broadcast_to(jnp.arange(64), tokens.shape)

    def kept(remat):
        network = Network.of(Decoder, dataclasses.replace(deep, remat=remat))

        def loss(params):
            return network(params, tokens, positions, jnp.ones_like(tokens)).var()

        compiled = jax.jit(jax.grad(loss)).lower(network.shapes()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    c, rows = deep, tokens.size
    wide = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.hidden_size + 2 * c.intermediate_size
    full, selective, everything = map(kept, ("full", "selective", "none"))
    # Of each layer what its linear layers give, 4 bytes a number.
    assert full + 0.7 * 8 * 4 * rows * wide < selective < full + 1.3 * 8 * 4 * rows * wide
    assert selective < everything


@pytest.mark.parametrize("kind", [(Decoder, TINY), (Encoder, TINY_ENCODER)])
def test_deep_networks_are_not_written_out(kind):
    """Each layer that is written out is compiled by itself."""
    module, config = kind

    def equations(layers):
        network = Network.of(module, dataclasses.replace(config, num_layers=layers)).written_out()
        traced = jax.jit(network).trace(network.shapes(), *inputs[module]).jaxpr
        scans = [e.params["unroll"] for e in traced.eqns if e.primitive.name == "scan"]
        return network.config.unroll, network.config.remat, scans

    tokens, positions, mask = tiny_inputs()
    inputs = {Decoder: (tokens, positions, mask), Encoder: (tokens, mask)}
    for layers in (1, 6, 12):
        assert equations(layers) == (True, "none", [layers])
    for layers in (13, 30):
        assert equations(layers) == (False, config.remat, [1])


def test_unrolled_lets_the_compiler_count_every_layer(tiny):
    network, _ = tiny
    deep = Network.of(Decoder, dataclasses.replace(TINY, num_layers=6))

    def flops(network):
        lowered = jax.jit(network).lower(network.shapes(), *tiny_inputs())
        return lowered.compile().cost_analysis()["flops"]

    assert network.unrolled().config.unroll
    assert flops(deep) == pytest.approx(flops(network), rel=0.05)
    assert flops(deep.unrolled()) == pytest.approx(2 * flops(network.unrolled()), rel=0.1)


def test_bfloat16_weights_give_float32_logits_near_the_float32_ones():
    model, half = hub.load(GOLDEN / "llama_gqa"), hub.load(GOLDEN / "llama_gqa", jnp.bfloat16)
    inputs = tiny_inputs()
    assert run(half.network, half.params, *inputs).dtype == jnp.bfloat16
    rough = logits(half.network, half.params, *inputs)
    assert rough.dtype == jnp.float32
    exact = logits(model.network, model.params, *inputs)
    assert 0 < jnp.abs(rough - exact).mean() < 0.05 * jnp.abs(exact).mean()


def test_float64_stays_float64():
    with jax.enable_x64(True):
        model = hub.load(GOLDEN / "llama_gqa", jnp.float64)
        wide = run(model.network, model.params, *tiny_inputs())
        assert wide.dtype == jnp.float64
        encoder = hub.load(GOLDEN / "bert_mean", jnp.float64)
        tokens, _, mask = tiny_inputs()
        assert run(encoder.network, encoder.params, tokens, mask).dtype == jnp.float64


# --- encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_mean", "bert_cls", "roberta", "xlm_roberta", "mpnet"])
def test_encoder_agrees_with_sentence_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), hub.load(GOLDEN / name)
    length = model.network.config.max_length
    batch = model.tokenizer(
        golden["texts"].tolist(),
        padding=True,
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    assert batch["input_ids"].shape[1] == length  # one text is cut
    ours = run(model.network, model.params, batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(ours, golden["vectors"], atol=1e-4, rtol=0)
    assert model.network.config.normalize == (name not in ("bert_cls", "roberta"))


def test_encoder_gradient_is_finite_for_a_row_of_padding():
    network = Network.of(Encoder, TINY_ENCODER)
    params = network.init(jax.random.key(0))
    tokens, _, mask = tiny_inputs()
    empty = mask.at[1].set(False)
    grads = jax.jit(jax.grad(lambda p: network(p, tokens, empty).sum()))(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_encoder_refuses_texts_beyond_its_positions():
    network = Network.of(Encoder, TINY_ENCODER)
    params = network.init(jax.random.key(0))
    tokens, _, mask = tiny_inputs(width=13)
    with pytest.raises(ConfigError, match=r"13 tokens.*12 positions"):
        network(params, tokens, mask)


@pytest.mark.parametrize("wrong", [{"pooling": "max"}, {"max_length": 13}, {"max_length": 0}])
def test_encoder_config_refuses(wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        dataclasses.replace(TINY_ENCODER, **wrong)


# --- config.json ------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLACES = {
    "transformers 5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
    "transformers 4": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    "older": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3},
}


def bare(config):
    """config.json without rope settings."""
    hf = FAMILIES[config.family].write(config)
    return {k: v for k, v in hf.items() if not k.startswith("rope_")}


@pytest.mark.parametrize("place", PLACES)
def test_rope_settings_are_read_from_both_places(place):
    config = FAMILIES["llama"].read(bare(TINY) | PLACES[place])
    assert config == dataclasses.replace(
        TINY, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)
    )
    assert FAMILIES["llama"].read(FAMILIES["llama"].write(config)) == config


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic'.*'default', 'linear', 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'.*'default', 'linear', 'llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5.*1.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0.*None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu'"),
    ],
)
def test_decoder_options_that_are_not_supported_are_refused_by_name(option, words):
    with pytest.raises(CheckpointError, match=words):
        FAMILIES["llama"].read(bare(TINY) | option)


@pytest.mark.parametrize(
    "option", [{"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}]
)
def test_encoder_options_that_are_not_supported_are_refused_by_name(option):
    (name, value), *_ = option.items()
    with pytest.raises(CheckpointError, match=f"{name} '{value}'.*supported"):
        FAMILIES["bert"].read(FAMILIES["bert"].write(TINY_ENCODER) | option)


# --- network ----------------------------------------------------------------------------------


def test_network_is_hashable_and_init_fits_shapes(tiny):
    network, params = tiny
    assert network == Network.of(Decoder, TINY)
    assert hash(network) == hash(Network.of(Decoder, TINY))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, network.shapes())
    kernel = params["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.std() == pytest.approx(16**-0.5, rel=0.1)
    assert not jnp.allclose(kernel[0], kernel[1])


def test_parameters_that_do_not_fit_are_named(tiny):
    network, params = tiny
    wrong = {k: v for k, v in params.items() if k != "norm"} | {"extra": {"w": jnp.ones(3)}}
    with pytest.raises(ConfigError, match=r"missing \['norm.scale'\], unknown \['extra.w'\]"):
        network(wrong, *tiny_inputs())
