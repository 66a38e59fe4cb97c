"""Adapters: what they add, what they leave alone, in one size and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ALL, TINY_ENCODER, logits, random_adapters, run, tiny_inputs

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError
from fedrag_jax.models import lora
from fedrag_jax.models.encoder import Encoder
from fedrag_jax.models.network import Network
from fedrag_jax.rag import RAGSystem


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


@pytest.mark.slow
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
    gradient = jax.grad(lambda a: run(network, params, *tiny_inputs(), adapters=a).var())
    grads = jax.jit(gradient)(adapters)
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
    with pytest.raises(ConfigError, match=r"'layers.9.*' matches none of \['layers.0.q_proj'"):
        lora.add_lora(base, lora.LoraConfig(patterns=(("layers.9.*", 2, 4.0),)))
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
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


def test_a_system_takes_adapters_of_its_own_shape():
    """Or those of several clients; others would be multiplied and scaled wrongly."""
    passages = [Passage(str(i), "", f"Passage {i}.") for i in range(3)]
    system = RAGSystem.build(passages, top_k=1, adapters=lora.LoraConfig(rank=4))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), system.adapters)
    for fitting in (system.adapters, stacked):
        assert system.replace(adapters=fitting).adapters is fitting
    for config in (lora.LoraConfig(rank=2), lora.LoraConfig(rank=4, targets=("k_proj",))):
        network = lora.add_lora(system.generator.network, config)
        with pytest.raises(ConfigError, match=r"lora_a has shape .*, and the network needs "):
            system.replace(adapters=lora.init_adapters(network, 0))
