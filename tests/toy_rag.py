"""A toy RAG system: four questions about four passages, a tokenizer of characters, tiny networks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from tiny import characters

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.prompts import COMPACT
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.encoder import Encoder, EncoderConfig
from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
from fedrag_jax.models.network import Network
from fedrag_jax.objectives.joint import marginal_likelihood
from fedrag_jax.retrieval.retriever import Retriever

KEY = jax.random.key(0)


TOKENIZER = characters()
PASSAGES = [Passage(f"p{i}", "", f"{name} was born in {city}.") for i, (name, city) in
            enumerate([("Ann", "Rome"), ("Bob", "Oslo"), ("Cy", "Lima"), ("Di", "Bonn")])]  # fmt: skip
EXAMPLES = [
    Example("a", "Where was Ann born?", ("Rome",), ("p0",)),
    Example("b", "Where was Bob born?", ("Oslo", "Christiania"), ("p1",)),
    Example("c", "Birthplace of Ann?", ("Rome",), ("p0",)),
    Example("d", "Where was Di?", ("Bonn town",), ("p3", "p2")),
]
DATASET = Dataset("toy", PASSAGES, EXAMPLES, [], [])


@functools.cache
def toy_parts():
    """A tiny decoder with adapters that do something, a tiny encoder, prompts and a retriever."""
    decoder = Network.of(
        Decoder,
        DecoderConfig(
            vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
            num_kv_heads=1, head_dim=8,
        ),
    )  # fmt: skip
    params = decoder.init(jax.random.key(1))
    decoder = add_lora(decoder, LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj")))
    adapters = init_adapters(decoder, 3)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    encoder = Network.of(
        Encoder,
        EncoderConfig(
            vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
            max_positions=64, max_length=64,
        ),
    )  # fmt: skip
    query = encoder.init(jax.random.key(2))

    @jax.jit
    def next_token(tokens, length):
        index = jnp.arange(160)
        hidden = decoder(
            params, tokens[None], index[None], (index < length)[None], adapters=adapters
        )
        return decoder(params, hidden[0, length - 1], method="logits")

    model = types.SimpleNamespace(
        network=encoder, tokenizer=TOKENIZER, params=query, name="toy", kind="encoder"
    )
    return types.SimpleNamespace(
        decoder=decoder,
        next_token=next_token,
        params=params,
        adapters=adapters,
        encoder=encoder,
        query=query,
        prompts=Prompts(TOKENIZER, COMPACT, PASSAGES, EXAMPLES),
        retriever=Retriever.build(model, PASSAGES),
    )


def rows(k):
    order = np.array([[0, 1, 2, 3], [2, 1, 0, 3], [1, 0, 3, 2], [3, 2, 1, 0]])
    return lambda examples: order[[EXAMPLES.index(e) for e in examples], :k]


def batch_of(task, weight=(1, 1, 1, 1)):
    table = {k: jnp.asarray(v) for k, v in task.table(EXAMPLES).items()}
    return table | {"weight": jnp.array(weight, jnp.float32)}


def slow_log_probs(parts, question, passages, answer):
    """log p of each answer token, one forward pass per token, nothing batched or gathered."""
    prompt = list(parts.prompts.prompt(question, passages))
    target = [int(t) for t in parts.prompts.answer_tokens(answer)]
    out = []
    for i, token in enumerate(target):
        so_far = prompt + target[:i]
        logits = parts.next_token(np.array(so_far + [0] * (160 - len(so_far))), len(so_far))
        logits = np.asarray(logits, np.float64)
        out.append(logits[token] - np.log(np.exp(logits).sum()))
    assert target[-1] == TOKENIZER.eos_token_id
    return np.array(out)


def joint_task(parts, **options):
    return marginal_likelihood(
        parts.decoder,
        {"decoder": parts.params, "adapters": parts.adapters},
        parts.prompts,
        parts.retriever,
        EXAMPLES,
        **{"passages": 3} | options,
    )
