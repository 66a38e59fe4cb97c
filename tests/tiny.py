"""Random networks small enough to run in no time, and what the tests of networks do with them."""

import functools

import jax
import jax.numpy as jnp

from fedrag_jax.models import lora
from fedrag_jax.models.decoder import DecoderConfig
from fedrag_jax.models.encoder import EncoderConfig

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
