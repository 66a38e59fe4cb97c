"""Memory of a federated round over a large frozen generator: computed, compiled and measured.

    python -m experiments.benchmarks.memory                          # Llama 3.1 8B, 32 clients, nf4
    python -m experiments.benchmarks.memory --model=small --tokens=128 --batch_size=2 --measure

The first allocates nothing: the round is compiled for shapes. The second also runs it, on zeros, and
reads the peak of the process. Prints one JSON object; GB are 1e9 bytes.
"""

import dataclasses
import json

from absl import app, flags

from experiments.benchmarks.process_memory import peak, resident

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

_MODEL = flags.DEFINE_enum("model", "llama-3.1-8b", list(MODELS), "decoder")
_FORMAT = flags.DEFINE_enum(
    "format", "nf4", ["bfloat16", "int8", "int4", "nf4"], "number format of the frozen layers"
)
_CLIENTS = flags.DEFINE_integer("clients", 32, "clients per round", lower_bound=1)
_GROUP = flags.DEFINE_integer("group_size", 1, "clients trained side by side", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "number of prompts per step", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 1024, "tokens of a prompt with its answer", lower_bound=17)
_RANK = flags.DEFINE_integer(
    "rank", 16, "rank of the adapters on queries and values", lower_bound=1
)
_REMAT = flags.DEFINE_enum(
    "remat", "full", ["full", "selective"], "what the backward pass recomputes"
)
_MEASURE = flags.DEFINE_bool("measure", False, "also run a round")


def main(argv):
    del argv
    import jax

    network = network_of(MODELS[_MODEL.value])
    base, adapters = shapes(network)
    run, state, rest = compiled_round(network, base, adapters)
    sizes = arithmetic(network, base, adapters)
    analysis = run.func.memory_analysis()
    report = {
        flag.name: flag.value
        for flag in (_MODEL, _FORMAT, _REMAT, _CLIENTS, _GROUP, _BATCH, _TOKENS)
    }
    report |= {
        "arithmetic_GB": {name: round(size / 1e9, 3) for name, size in sizes.items()},
        "arithmetic_total_GB": round(sum(sizes.values()) / 1e9, 3),
        "compiler_GB": {
            "arguments": round(analysis.argument_size_in_bytes / 1e9, 3),
            "temporary": round(analysis.temp_size_in_bytes / 1e9, 3),
        },
        "upload_of_a_client_MB": round(nbytes(adapters) / 1e6, 2),
        "device": jax.devices()[0].device_kind,
    }
    if _MEASURE.value:
        if jax.default_backend() != "cpu":
            raise SystemExit("--measure reads the memory of the process: set JAX_PLATFORMS=cpu")
        before = resident()
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), (state, base))
        jax.block_until_ready(run(zeros[0], {"decoder": zeros[1]}, *rest))
        report["process_GB"] = {"before": round(before / 1e9, 3), "peak": round(peak() / 1e9, 3)}
    print(json.dumps(report, indent=2))


def network_of(hf: dict):
    """The decoder of a config.json, with adapters on queries and values."""
    from fedrag_jax.models.families import family_of
    from fedrag_jax.models.lora import LoraConfig, add_lora
    from fedrag_jax.models.network import Network

    family = family_of(hf)
    lora = LoraConfig(_RANK.value, 2.0 * _RANK.value)
    config = dataclasses.replace(family.read(hf), remat=_REMAT.value)
    return add_lora(Network.of(family.module, config), lora)


def shapes(network):
    """Returns shapes of the frozen base (bfloat16 or the flag's format) and float32 adapters."""
    import jax
    import jax.numpy as jnp

    from fedrag_jax.models.network import flatten, unflatten
    from fedrag_jax.models.quantized import quantize

    leaves = dict(flatten(network.shapes()))
    adapters = {path: x for path, x in leaves.items() if path[-1].startswith("lora_")}
    base = unflatten(
        (path, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16))
        for path, x in leaves.items()
        if path not in adapters
    )
    if _FORMAT.value != "bfloat16":
        base = jax.eval_shape(lambda base: quantize(base, _FORMAT.value), base)
    return base, unflatten(adapters.items())


def compiled_round(network, base, adapters):
    """`(run, state, the arguments after state and base)` of federated averaging, one step a client."""
    import jax
    import numpy as np
    import optax

    from fedrag_jax.data.batching import ANSWER_TOKENS
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.engine.cohort import Cohort
    from fedrag_jax.federated.engine.round import Round, compile_round
    from fedrag_jax.federated.optimizers import tunable
    from fedrag_jax.objectives.generator import AnswerLoss

    clients, rows, tokens = _CLIENTS.value, _BATCH.value, _TOKENS.value
    answer = np.arange(tokens - ANSWER_TOKENS, tokens, dtype=np.int32)
    table = {
        "tokens": np.zeros((rows, 1, tokens), np.int32),
        "lengths": np.full((rows, 1), tokens, np.int32),
        "answer_positions": np.tile(answer, (rows, 1, 1)),
        "answer_mask": np.ones((rows, ANSWER_TOKENS), np.float32),
    }
    groups = -(-clients // _GROUP.value), _GROUP.value
    cohort = Cohort(
        clients=np.arange(groups[0] * groups[1], dtype=np.int32).reshape(groups),
        share=np.full(groups, 1 / clients),
        steps=np.ones(groups, np.int32),
        indices=np.tile(np.arange(rows, dtype=np.int32), (*groups, 1, 1)),
        example_weight=np.ones((*groups, 1, rows), np.float32),
    )
    algorithm, optimizer = fed_avg(local_steps=1), tunable(optax.adamw, learning_rate=1e-4)
    state = jax.eval_shape(
        lambda adapters: algorithm.init({"adapters": adapters}, optimizer.init, clients),
        adapters,
    )
    rest = table, [cohort], np.int32(0), jax.random.key(0)
    loss = AnswerLoss(network)
    (turn,) = algorithm.turns
    arguments = state, {"decoder": base}, *rest
    run = compile_round(Round(loss, turn, optimizer, None, arguments))
    return run, state, rest


def arithmetic(network, base, adapters) -> dict[str, float]:
    """Returns the bytes that a round holds at the same time.

    Adapters: the global adapters and the sum of updates; for each client of a group, its adapters,
    their gradient and two moments of Adam. Activations: the input of each layer; with selective remat,
    also the outputs of its linear layers except the last; for the current layer, its dense matrices,
    its linear outputs, and the attention's scores and weights in float32.
    """
    c, group, tokens, half = network.config, _GROUP.value, _TOKENS.value, 2  # bytes of bfloat16
    sequences = group * _BATCH.value
    kept = c.hidden_size
    if _REMAT.value == "selective":
        heads = c.num_heads + 2 * c.num_kv_heads
        kept += heads * c.head_dim + c.hidden_size + 2 * c.intermediate_size
    width = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size
    return {
        "base": nbytes(base),
        "adapters": (2 + 4 * group) * nbytes(adapters),
        "kept of each layer": half * c.num_layers * sequences * tokens * kept,
        "layer at work": half * (sequences * tokens * (width + 2 * c.hidden_size))
        + half * c.hidden_size * width
        + 2 * 4 * sequences * c.num_heads * tokens**2,
    }


def nbytes(tree) -> float:
    """Returns the bytes of all arrays; types of fewer than 8 bits are packed."""
    import jax
    import jax.numpy as jnp

    def bits(x):
        about = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
        return x.size * about(x.dtype).bits

    return sum(map(bits, jax.tree.leaves(tree))) / 8


if __name__ == "__main__":
    app.run(main)
