"""Random networks small enough to run in no time, and what the tests of networks do with them."""

import functools
import string

import jax
import jax.numpy as jnp
from flax import nnx

from fedrag_jax.models import lora
from fedrag_jax.models.decoder import DecoderConfig
from fedrag_jax.models.encoder import EncoderConfig
from fedrag_jax.models.layers import Linear, run_stack, stack
from fedrag_jax.models.network import Network

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


class Chain(nnx.Module):
    """Two linear layers that take adapters, and an output that takes some too: the least there is."""

    def __init__(self, config, lora=None, *, rngs):
        self.config = config
        inside, outside = (lora.widths(n) if lora else {} for n in (2, None))
        self.layers = stack(2, lambda r: _Link(inside, rngs=r), rngs)
        self.lm_head = Linear("lm_head", 6, 5, outside, rngs=rngs)

    def __call__(self, x):
        x, _ = run_stack(self.layers, lambda layer, x, _: (layer(x), None), x, self.config)
        return self.lm_head(x)


class _Link(nnx.Module):
    def __init__(self, lora, *, rngs):
        self.q_proj = Linear("q_proj", 6, 6, lora, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.q_proj(x))


CHAIN = Network.of(Chain, TINY_ENCODER)


def characters(letters=string.printable):
    """A tokenizer of characters: enough for shapes and boundaries."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "?"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *sorted({*letters} - {"?"})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
