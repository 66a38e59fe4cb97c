"""Run by test_sharding.py where JAX sees eight devices: the same numbers from a base that is cut up."""

import re
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.loading import model_mesh
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.engine.placement import mesh_under
from fedrag_jax.federated.engine.round import _compile
from fedrag_jax.federated.fit import fit
from fedrag_jax.generation.decoding import generate
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.models import lora
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network, flatten
from fedrag_jax.models.quantized import quantize
from fedrag_jax.models.sharding import shard
from fedrag_jax.objectives.generator import AnswerLoss
from fedrag_jax.objectives.task import Task
from fedrag_jax.strategies.regimes import clients_mesh

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8, num_kv_heads=8,
    head_dim=8, qkv_bias=True, o_bias=True,
)  # fmt: skip
ROWS, WIDTH, ANSWER = 6, 12, 3


def task_on(params, network, table):
    return Task(
        "sharded",
        {"adapters": lora.init_adapters(network, 0)},
        {"decoder": params},
        AnswerLoss(network),
        lambda examples, _: {name: column[examples] for name, column in table.items()},
    )


def main(format: str) -> None:
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("model",))
    network = lora.add_lora(
        Network.of(Decoder, CONFIG), lora.LoraConfig(2, 4.0, ("q_proj", "down_proj"))
    )
    params = network.init(jax.random.key(0))
    if format != "float32":
        params = quantize(params, format, block=8)
    cut = shard(params, mesh)

    # An eighth of every matrix on every device.
    for path, leaf in flatten(cut):
        for array in jax.tree.leaves(leaf):
            whole = (path[-1] == "scale" and "norm" in path[-2]) or path[-2:] == ("o_proj", "bias")
            share = array.size if whole else array.size // 8
            assert [s.data.size for s in array.addressable_shards] == [share] * 8, path

    # Likelihoods, what is written, and no gathering of the base.
    rng = np.random.default_rng(0)
    table = {
        "tokens": rng.integers(0, 64, (ROWS, 1, WIDTH)).astype(np.int32),
        "lengths": np.full((ROWS, 1), WIDTH, np.int32),
        "answer_positions": np.tile(np.arange(WIDTH - ANSWER, WIDTH, dtype=np.int32), (ROWS, 1, 1)),
        "answer_mask": np.ones((ROWS, ANSWER), np.float32),
    }
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init_adapters(network, 0))
    score = jax.jit(lambda params, adapters: answer_log_probs(network, params, adapters, table))
    np.testing.assert_allclose(score(cut, adapters), score(params, adapters), atol=1e-5)
    tokens = table["tokens"][:, 0]
    written = [
        generate(network, p, tokens, np.ones_like(tokens), adapters=adapters).tokens
        for p in (cut, params)
    ]
    np.testing.assert_array_equal(*written)
    program = score.lower(cut, adapters).compile().as_text()
    assert "all-reduce" in program
    largest = CONFIG.hidden_size * CONFIG.intermediate_size
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program):
        assert np.prod([int(n) for n in shape.split(",")]) < largest // 2, shape

    # A federated round, the program of the first serving all.
    clients = Partition(list(range(ROWS)), (np.arange(2), np.arange(2, ROWS)))
    settings = {"rounds": 3, "batch_size": 2, "group_size": 2}
    compiled = _compile.cache_info().misses
    found, expected = (
        fit(task_on(p, network, table), clients, fed_avg(local_steps=2), **settings)
        for p in (cut, params)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        found.trainable,
        expected.trainable,
    )
    assert _compile.cache_info().misses == compiled + 2

    # Clients over four pairs of devices, each pair with a base of its own.
    both = model_mesh(2, 0, jax.devices())
    assert dict(both.shape) == {"clients": 4, "model": 2}
    paired = task_on(shard(params, both), network, table)
    assert clients_mesh(0, mesh_under(paired.frozen)) == both
    found = fit(paired, clients, fed_avg(local_steps=2), mesh=both, **settings)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        found.trainable,
        expected.trainable,
    )

    # What eight devices cannot share.
    others = {
        "no axis 'model'": Mesh(np.array(jax.devices()), ("data",)),
        "3 devices do not divide": Mesh(np.array(jax.devices()[:3]), ("model",)),
    }
    for words, other in others.items():
        try:
            shard(params, other)
        except ConfigError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
