"""Memory of a federated round over a large frozen generator: by arithmetic, compiler and running it.

    python -m experiments.benchmarks.memory                          # Llama 3.1 8B, 32 clients, nf4
    python -m experiments.benchmarks.memory --model=small --tokens=128 --batch_size=2 --measure

The first allocates nothing: the round is compiled for shapes. The second also runs it and reads the
peak of the process. Prints one JSON object; GB are 1e9 bytes.
"""

import json
import resource

from absl import app, flags

MODELS = {  # config.json of the decoder
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
    "small": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
    },
}  # fmt: skip
FLAGS = flags.FLAGS


def network_of(hf: dict, rank: int):
    """The decoder of a config.json, with adapters on queries and values."""
    from fedrag_jax.models.families import family_of
    from fedrag_jax.models.lora import LoraConfig, add_lora
    from fedrag_jax.models.network import Network

    family = family_of(hf)
    return add_lora(Network.of(family.module, family.read(hf)), LoraConfig(rank, 2.0 * rank))


def base_and_adapters(network, format: str):
    """Shapes of the frozen base, its matrices in bfloat16 or quantised, and of the adapters."""
    import jax
    import jax.numpy as jnp

    from fedrag_jax.models.network import flatten, unflatten
    from fedrag_jax.models.quantized import quantize

    base, adapters = {}, {}
    for path, leaf in flatten(network.shapes()):
        if path[-1].startswith("lora_"):
            adapters[path] = leaf
        else:
            base[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    base, adapters = unflatten(base.items()), unflatten(adapters.items())
    if format != "bfloat16":
        base = jax.eval_shape(lambda base: quantize(base, format), base)
    return base, adapters


def arithmetic(network, base, adapters, group: int, rows: int, tokens: int) -> dict[str, float]:
    """Bytes of what a round must hold.

    Adapters: the global ones and the sum of updates, and for each client of the group its own, their
    gradient and two moments of Adam. Activations, with layers recomputed in the backward pass: what
    enters each layer, and within the one at work its matrices made dense, its linear outputs, and
    scores and weights of attention in float32.
    """
    import jax

    c = network.config
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(adapters))
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kernels = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    width = 2 * heads + 2 * kv + 3 * c.intermediate_size + 2 * c.hidden_size
    positions, half = group * rows * tokens, 2  # bytes of bfloat16
    return {
        "base": sum(bits(x) / 8 for x in jax.tree.leaves(base)),
        "adapters": (2 + 4 * group) * size,
        "entering each layer": half * c.num_layers * positions * c.hidden_size,
        "layer at work": half * (positions * width + kernels)
        + 2 * 4 * group * rows * c.num_heads * tokens**2,
        "one client's adapters": size,
    }


def bits(x) -> int:
    """Of an array, packed."""
    import jax.numpy as jnp

    kind = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    return x.size * kind(x.dtype).bits


def main(_):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from fedrag_jax.federated.cohort import Cohort, grouped
    from fedrag_jax.federated.fed_avg import fed_avg
    from fedrag_jax.federated.optimizers import tunable
    from fedrag_jax.federated.round import compile_round
    from fedrag_jax.models.lora import init_adapters
    from fedrag_jax.objectives.generator import AnswerLoss

    network = network_of(MODELS[FLAGS.model], FLAGS.rank)
    base, adapters = base_and_adapters(network, FLAGS.format)
    clients, rows, tokens, answer = FLAGS.clients, FLAGS.batch_size, FLAGS.tokens, 16
    algorithm, optimizer = (
        fed_avg(local_steps=FLAGS.local_steps),
        tunable(optax.adamw, learning_rate=1e-4),
    )
    table = {
        "tokens": np.zeros((rows, 1, tokens), np.int32),
        "lengths": np.full((rows, 1), tokens, np.int32),
        "answer_positions": np.tile(
            np.arange(tokens - answer, tokens, dtype=np.int32), (rows, 1, 1)
        ),
        "answer_mask": np.ones((rows, answer), np.float32),
    }
    steps = (clients, FLAGS.local_steps)
    cohort = Cohort(
        clients=np.arange(clients, dtype=np.int32),
        size=np.ones(clients, np.float32),
        indices=np.tile(np.arange(rows, dtype=np.int32), (*steps, 1)),
        step_mask=np.ones(steps, bool),
        example_weight=np.ones((*steps, rows), np.float32),
    )
    state = jax.eval_shape(
        lambda a: algorithm.init({"adapters": a}, clients, jax.vmap(optimizer.init)), adapters
    )
    rest = table, grouped(cohort, FLAGS.group_size, clients), np.int32(0), jax.random.key(0)
    run = compile_round(AnswerLoss(network), algorithm, optimizer, state, {"decoder": base}, *rest)
    planned = arithmetic(network, base, adapters, FLAGS.group_size, rows, tokens)
    compiled = run.func.memory_analysis()
    result = {
        "model": FLAGS.model,
        "format": FLAGS.format,
        "clients": clients,
        "group_size": FLAGS.group_size,
        "batch_size": rows,
        "tokens": tokens,
        "arithmetic_GB": {name: round(size / 1e9, 3) for name, size in planned.items()},
        "compiler_GB": {
            "arguments": round(compiled.argument_size_in_bytes / 1e9, 3),
            "temporary": round(compiled.temp_size_in_bytes / 1e9, 3),
        },
        "device": jax.devices()[0].device_kind,
    }
    del result["arithmetic_GB"]["one client's adapters"]
    result["arithmetic_GB"]["all"] = round(sum(result["arithmetic_GB"].values()), 3)
    result["uploaded by a client in a round, MB"] = round(planned["one client's adapters"] / 1e6, 2)
    if FLAGS.measure:
        parameters = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), base)
        start = algorithm.init(
            {"adapters": init_adapters(network, 0)}, clients, jax.vmap(optimizer.init)
        )
        start = jax.tree.map(jnp.array, start)
        state, _ = run(start, {"decoder": parameters}, *rest)
        jax.block_until_ready(state)
        result["peak_of_the_process_GB"] = round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    flags.DEFINE_enum("model", "llama-3.1-8b", list(MODELS), "the decoder")
    flags.DEFINE_enum("format", "nf4", ["bfloat16", "int8", "int4", "nf4"], "of the frozen layers")
    flags.DEFINE_integer("clients", 32, "of the round")
    flags.DEFINE_integer("group_size", 1, "clients side by side")
    flags.DEFINE_integer("local_steps", 1, "of a client")
    flags.DEFINE_integer("batch_size", 4, "prompts in a step")
    flags.DEFINE_integer("tokens", 1024, "of a prompt with its answer")
    flags.DEFINE_integer("rank", 16, "of the adapters")
    flags.DEFINE_bool("measure", False, "also run it, on zeros")
    app.run(main)
