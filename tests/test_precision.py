"""A base in bfloat16: adapters, their optimizer, losses and norms stay in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import logits

from fedrag_jax.data import synthetic
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit
from fedrag_jax.models import hub
from fedrag_jax.models.layers import RMSNorm, attend
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.objectives.generator import concatenated
from fedrag_jax.rag import RAGSystem


@functools.cache
def world():
    return synthetic.generate()


def task_of(dtype, targets=("q_proj", "v_proj", "down_proj")):
    """Answer NLL of the built-in decoder over one passage; adapters that do something."""
    dataset = world()
    system = RAGSystem.build(
        dataset.passages[:200],
        generator=hub.load("builtin:decoder", dtype),
        retriever="builtin:encoder",
        examples=dataset.train,
        adapters=LoraConfig(8, 16.0, targets),
        top_k=1,
    )
    prompts = system.prompts
    rows = {p.id: i for i, p in enumerate(dataset.passages[:200])}
    examples = [e for e in dataset.train if {*e.positive_ids} <= rows.keys()]

    def gold(asked):
        return np.array([[rows[e.positive_ids[0]]] for e in asked])

    keys = iter(jax.random.split(jax.random.key(3), 99))
    adapters = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), system.adapters
    )
    task = concatenated(system.decoder, system.generator.params, adapters, prompts, gold)
    return task, examples


def loss_and_gradient(dtype, count=16):
    task, examples = task_of(dtype)
    batch = {k: jnp.asarray(v) for k, v in task.collate(examples[:count], None).items()}
    batch["weight"] = jnp.ones(count)
    value = jax.value_and_grad(lambda t: task.loss(t, task.frozen, batch, jax.random.key(0))[0])
    return jax.jit(value)(task.trainable)


def test_loss_and_gradient_of_a_bfloat16_base_are_near_float32s():
    loss, gradient = loss_and_gradient(jnp.float32)
    half_loss, half = loss_and_gradient(jnp.bfloat16)
    assert half_loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: errors of 2^-9 a product, over four layers.
    assert abs(half_loss - loss) < 0.01 * loss
    flat, other = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradient, half)
    )
    assert np.linalg.norm(flat - other) < 0.06 * np.linalg.norm(flat)
    assert np.linalg.norm(flat - other) > 1e-5 * np.linalg.norm(flat)  # it was in bfloat16


def test_logits_and_attention_scores_are_not_rounded_to_bfloat16():
    model = hub.load("builtin:decoder", jnp.bfloat16)
    tokens = jnp.arange(5, 45)[None]
    found = logits(model.network, model.params, tokens, jnp.arange(40)[None], tokens > 0)
    assert found.dtype == jnp.float32
    assert (found != found.astype(jnp.bfloat16)).mean() > 0.9
    # Two keys whose scores differ by less than bfloat16 tells apart at 256.
    q = jnp.array([[[[16.0, 1.0]]]], jnp.bfloat16)
    k = jnp.array([[[[16.0, 0.0], [16.0, 0.5]]]], jnp.bfloat16)
    v = jnp.array([[[[0.0, 0.0], [1.0, 1.0]]]], jnp.bfloat16)
    weight = attend(q * 2**0.5, k, v, jnp.ones((1, 1, 2), bool))[0, 0, 0]
    assert abs(float(weight) - 1 / (1 + np.exp(-0.5))) < 0.01


@pytest.mark.parametrize("centred", [False, True])
def test_norms_are_computed_in_float32(centred):
    x = jax.random.normal(jax.random.key(0), (64, 256)) * 30
    norm, narrow = RMSNorm(256, 1e-6, centred), x.astype(jnp.bfloat16)
    expected = norm(narrow.astype(jnp.float32))
    norm.scale = nnx.Param(norm.scale[...].astype(jnp.bfloat16))  # as of a base in bfloat16
    assert norm(narrow).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(narrow).astype(jnp.float32), expected, rtol=2**-8)


def test_adapters_and_their_moments_stay_in_float32():
    task, examples = task_of(jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(task.frozen)} >= {jnp.dtype("bfloat16")}
    optimizer, seen = optax.adamw(1e-3), []

    def update(gradients, state, params=None):
        seen.extend(x.dtype for x in jax.tree.leaves((gradients, state[0].mu, state[0].nu)))
        return optimizer.update(gradients, state, params)

    watched = optax.GradientTransformation(optimizer.init, update)
    result = fit(
        task, examples[:8], fed_avg(local_steps=2), optimizer=watched, rounds=1, batch_size=4
    )
    assert {*seen} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(result.trainable)} == {jnp.dtype("float32")}


@pytest.mark.slow  # 800 steps
def test_tuning_ends_within_noise_of_float32():
    def ends(dtype, seed):
        task, examples = task_of(dtype)
        held_out, rest = examples[:64], examples[64:]
        how = {"optimizer": optax.adamw(1e-3), "rounds": 10, "batch_size": 4, "seed": seed}
        tuned = fit(task, rest, fed_avg(local_steps=20), **how).trainable
        batch = {k: jnp.asarray(v) for k, v in task.collate(held_out, None).items()}
        batch["weight"] = jnp.ones(len(held_out))
        return float(jax.jit(task.loss)(tuned, task.frozen, batch, jax.random.key(0))[0])

    wide = [ends(jnp.float32, seed) for seed in range(3)]
    half = ends(jnp.bfloat16, 0)
    assert abs(half - wide[0]) < np.ptp(wide), (half, wide)
