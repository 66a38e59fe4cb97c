"""Networks against transformers (golden files, see golden/make_goldens.py), and LoRA."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.models import hub, lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig, Llama3Scaling, rope_frequencies
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.families import FAMILIES
from fedrag_jax.models.network import Network

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
TINY_ENCODER = EncoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    max_positions=12,
    max_length=10,
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_inputs(rows=2, width=7):
    tokens = jax.random.randint(jax.random.key(5), (rows, width), 0, 40)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    return tokens, positions, jnp.ones(tokens.shape, bool)


@functools.partial(jax.jit, static_argnums=0)
def run(network, params, *inputs, **options):
    return network(params, *inputs, **options)


@functools.partial(jax.jit, static_argnums=0)
def logits(network, params, *inputs, adapters=None):
    hidden = network(params, *inputs, adapters=adapters)
    return network(params, hidden, method="logits", adapters=adapters)


def random_adapters(network, seed):
    """Adapters whose B is not zero."""
    fresh = lora.init_adapters(network, seed)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noise)


@pytest.fixture(scope="module")
def tiny():
    network = Network.of(Decoder, TINY)
    return network, network.init(jax.random.key(0))


# --- decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama_gqa", "llama_tied", "llama_biased", "mistral", "qwen2", "qwen3"]
)
def test_decoder_agrees_with_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), hub.load(GOLDEN / name)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    ours = logits(model.network, model.params, *inputs)
    assert ours.dtype == jnp.float32
    real = golden["mask"]
    np.testing.assert_allclose(ours[real], golden["logits"][real], atol=1e-4, rtol=0)


def test_golden_positions_are_far_enough_for_rope_scaling_to_matter():
    golden, model = np.load(GOLDEN / "llama_gqa.npz"), hub.load(GOLDEN / "llama_gqa")
    config = dataclasses.replace(model.network.config, rope_scaling=None)
    inputs = [golden[n] for n in ("tokens", "positions", "mask")]
    unscaled = logits(Network.of(Decoder, config), model.params, *inputs)
    assert np.abs(unscaled - golden["logits"])[golden["mask"]].max() > 0.1


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
    cache = network(params, 2, 9, method="empty_cache")
    parts = []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 7)):
        inputs = (x[:, piece] for x in (tokens, positions, mask))
        hidden, cache = run(network, params, *inputs, cache=cache)
        parts.append(hidden)
    whole = run(network, params, tokens, positions, mask)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[mask], whole[mask], atol=1e-5)
    assert cache.length == 7


@pytest.mark.parametrize("change", [{}, {"unroll": True}, {"remat": False}, {"num_layers": 1}])
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

    np.testing.assert_allclose(some(params), all_of_them(params), atol=1e-5)
    found, expected = (jax.grad(lambda p, f=f: f(p).var())(params) for f in (some, all_of_them))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": False}])
def test_unroll_and_remat_change_no_number(tiny, change):
    network, params = tiny
    other = Network.of(Decoder, dataclasses.replace(TINY, **change))

    def loss(params, network):
        return logits(network, params, *tiny_inputs()).var()

    expected, got = (jax.grad(loss)(params, n) for n in (network, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, got)


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
    grads = jax.grad(lambda p: network(p, tokens, mask.at[1].set(False)).sum())(params)
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
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*'default', 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'.*'default', 'llama3'"),
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


# --- LoRA -------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_mirror_the_parameters(tiny):
    base, params = tiny
    network = lora.add_lora(base, lora.LoraConfig(rank=2, targets=ALL))
    adapters = lora.init_adapters(network, jax.random.key(1))
    shapes = jax.tree.map(jnp.shape, adapters)["layers"]
    assert shapes["attention"]["k_proj"] == {"lora_a": (3, 16, 2), "lora_b": (3, 2, 12)}
    assert set(shapes["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    a = adapters["layers"]["mlp"]["down_proj"]["lora_a"]
    assert 0.8 * 24**-0.5 < jnp.abs(a).max() <= 24**-0.5
    expected = run(base, params, *tiny_inputs())
    fresh = run(network, params, *tiny_inputs(), adapters=adapters)
    np.testing.assert_array_equal(fresh, expected)
    np.testing.assert_array_equal(run(network, params, *tiny_inputs()), expected)


def test_merged_equals_unmerged(tiny):
    base, params = tiny
    network = lora.add_lora(base, lora.LoraConfig(rank=2, alpha=3.0, targets=(*ALL, "lm_head")))
    adapters = random_adapters(network, 1)
    expected = logits(network, params, *tiny_inputs(), adapters=adapters)
    merged = lora.merge(network, params, adapters)
    np.testing.assert_allclose(logits(base, merged, *tiny_inputs()), expected, atol=2e-3, rtol=1e-3)
    assert jnp.abs(expected - logits(base, params, *tiny_inputs())).max() > 0.1
    a, b = (adapters["layers"]["attention"]["q_proj"][n][1] for n in ("lora_a", "lora_b"))
    kernel = params["layers"]["attention"]["q_proj"]["kernel"][1]
    got = merged["layers"]["attention"]["q_proj"]["kernel"][1]
    np.testing.assert_allclose(got, kernel + 1.5 * a @ b, atol=1e-5)


def test_unmerged_is_what_was_merged(tiny):
    base, params = tiny
    network = lora.add_lora(base, lora.LoraConfig(rank=2, targets=(*ALL, "lm_head")))
    adapters = random_adapters(network, 1)
    back = lora.unmerge(network, lora.merge(network, params, adapters), adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, params)


PATTERNS = ((r"layers\.0\.q_proj", 5, 10.0), (r".*\.(q|v)_proj", 2, 3.0), ("lm_head", 4, 2.0))


def test_layers_of_several_ranks(tiny):
    """Against a dense update in NumPy, layer by layer, each with its own rank and alpha."""
    base, params = tiny
    targets = ("q_proj", "v_proj", "up_proj", "lm_head")
    network = lora.add_lora(base, lora.LoraConfig(3, 6.0, targets, PATTERNS))
    adapters = lora.init_adapters(network, 0)
    sizes = {
        ("attention", "q_proj"): [(5, 10.0), (2, 3.0), (2, 3.0)],
        ("attention", "v_proj"): [(2, 3.0)] * 3,
        ("mlp", "up_proj"): [(3, 6.0)] * 3,
    }
    rng, dense = np.random.default_rng(0), jax.tree.map(np.array, params)
    for (block, name), each in sizes.items():
        leaf, kernel = adapters["layers"][block][name], dense["layers"][block][name]["kernel"]
        b = np.array(leaf["lora_b"])
        for layer, (rank, alpha) in enumerate(each):
            a = np.asarray(leaf["lora_a"][layer])
            assert (np.abs(a).max(axis=0) > 0).tolist() == [i < rank for i in range(a.shape[1])]
            b[layer, :rank] = rng.normal(size=b[layer, :rank].shape)
            kernel[layer] += alpha / rank * a[:, :rank] @ b[layer, :rank]
        leaf["lora_b"] = jnp.asarray(b)
    head = adapters["lm_head"]
    assert head["lora_a"].shape[1] == 4
    head["lora_b"] = jnp.asarray(rng.normal(size=head["lora_b"].shape), jnp.float32)
    dense["lm_head"]["kernel"] += 0.5 * np.asarray(head["lora_a"] @ head["lora_b"])
    ours = logits(network, params, *tiny_inputs(), adapters=adapters)
    np.testing.assert_allclose(ours, logits(base, dense, *tiny_inputs()), atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(
        logits(base, lora.merge(network, params, adapters), *tiny_inputs()),
        ours,
        atol=2e-3,
        rtol=1e-3,
    )


def test_training_leaves_the_room_of_smaller_ranks_empty(tiny):
    base, params = tiny
    config = lora.LoraConfig(3, 6.0, ("q_proj", "v_proj"), PATTERNS[:2])
    network = lora.add_lora(base, config)
    adapters = lora.init_adapters(network, 0)
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state):
        grads = jax.grad(lambda a: run(network, params, *tiny_inputs(), adapters=a).var())(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(4):
        adapters, state = step(adapters, state)
    q = adapters["layers"]["attention"]["q_proj"]
    assert jnp.abs(q["lora_b"][:, :2]).min(axis=-1).max() > 0
    assert jnp.abs(q["lora_b"][0]).max(axis=-1).min() > 0
    assert not q["lora_b"][1:, 2:].any() and not q["lora_a"][1:, :, 2:].any()


def test_clients_side_by_side_equal_clients_in_turn(tiny):
    base, params = tiny
    network = lora.add_lora(base, lora.LoraConfig(rank=2))
    each = [random_adapters(network, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)

    def loss(adapters, params):
        return logits(network, params, *tiny_inputs(), adapters=adapters).var()

    one = jax.jit(jax.grad(loss))
    together = jax.jit(jax.vmap(one, in_axes=(0, None)))(stacked, params)
    for i, adapters in enumerate(each):
        alone = one(adapters, params)
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), mine, alone
        )


def test_gradients_reach_every_adapter(tiny):
    base, params = tiny
    network = lora.add_lora(base, lora.LoraConfig(rank=2, targets=ALL))
    adapters = random_adapters(network, 0)
    grads = jax.grad(lambda a: run(network, params, *tiny_inputs(), adapters=a).var())(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_encoder_takes_adapters_too():
    network = lora.add_lora(
        Network.of(Encoder, TINY_ENCODER), lora.LoraConfig(targets=("up_proj",))
    )
    params, adapters = network.init(jax.random.key(0)), random_adapters(network, 0)
    tokens, _, mask = tiny_inputs()
    tuned = run(network, params, tokens, mask, adapters=adapters)
    merged = run(network, lora.merge(network, params, adapters), tokens, mask)
    np.testing.assert_allclose(tuned, merged, atol=1e-5)
    assert jnp.abs(tuned - run(network, params, tokens, mask)).max() > 1e-3


def test_lora_errors_say_what_there_is(tiny):
    base, params = tiny
    with pytest.raises(ConfigError, match=r"\['query'\].*'q_proj'"):
        lora.add_lora(base, lora.LoraConfig(targets=("query", "k_proj")))
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        lora.LoraConfig(rank=0)
    with pytest.raises(ConfigError, match="rank must be at least 1, got -1"):
        lora.LoraConfig(patterns=((".*", -1, 1.0),))
    with pytest.raises(ConfigError, match=r"'layers.9.*' fits none of \['layers.0.q_proj'"):
        lora.add_lora(base, lora.LoraConfig(patterns=(("layers.9.*", 2, 4.0),)))
    with pytest.raises(ConfigError, match=r"'\(' is no expression"):
        lora.LoraConfig(patterns=(("(", 2, 4.0),))
    listed = lora.LoraConfig(targets=["q_proj"], patterns=[["lm_head", 2, 4.0]])
    assert hash(listed) == hash(lora.LoraConfig(8, 16.0, ("q_proj",), (("lm_head", 2, 4.0),)))
    network = lora.add_lora(base, lora.LoraConfig())
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), lora.init_adapters(network, 0))
    with pytest.raises(ConfigError, match=r"q_proj.lora_b has shape \(2, 3, .*take those of one"):
        lora.merge(network, params, stacked)
    with pytest.raises(ConfigError, match="from add_lora"):
        lora.merge(base, params, lora.init_adapters(network, 0))
    with pytest.raises(ConfigError, match=r"targets must name.*'q_proj'"):
        lora.LoraConfig(targets="q_proj")
    with pytest.raises(ConfigError, match="add_lora"):
        lora.init_adapters(base, 0)
    adapters = lora.init_adapters(lora.add_lora(base, lora.LoraConfig()), 0)
    with pytest.raises(ConfigError, match=r"unknown.*q_proj.lora_a.*add_lora"):
        base(params, *tiny_inputs(), adapters=adapters)
