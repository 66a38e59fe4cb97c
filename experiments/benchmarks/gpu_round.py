"""The share of an accelerator's peak that a federated LoRA round of a 0.5-billion decoder reaches.

    python -m experiments.benchmarks.gpu_round
    python -m experiments.benchmarks.gpu_round --clients=8 --group_size=8 --remat=full
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.gpu_round --model=small --tokens=64 --clients=2

The decoder has the shape of Qwen2.5-0.5B and random numbers in bfloat16; adapters on all its linear
layers are float32. Clients are distributed over all devices, in groups whose size is measured first
unless it is given. Model operations (those of the ledger's formula: nothing recomputed is counted) over
the median round are set against the best bfloat16 product measured in the same process and, where it
is known, against the published peak. Prints a line of JSON last, about the last number of clients;
`client_steps_per_second` has all. `device_waits` is the share of a round from the end of one to the
start of the next, in which no device works.
"""

import contextlib
import json
import statistics

from absl import app, flags

from experiments.benchmarks.chips import known
from experiments.benchmarks.peak import product_peak

MODELS = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_layers": 24,
        "num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "qkv_bias": True,
        "tie_embeddings": True,
    },
    "small": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2,
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 32,
    },
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_MODEL = flags.DEFINE_enum("model", "qwen2.5-0.5b", list(MODELS), "decoder")
_CLIENTS = flags.DEFINE_list("clients", ["8", "32"], "clients per round; each number is a row")
_GROUP = flags.DEFINE_integer(
    "group_size", 0, "clients trained side by side; 0 measures the fastest number", lower_bound=0
)
_STEPS = flags.DEFINE_integer("local_steps", 4, "steps per client and round", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "number of sequences per step", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
    "tokens", 512, "tokens of a sequence with its answer", lower_bound=17
)
_RANK = flags.DEFINE_integer("rank", 16, "rank of the adapters", lower_bound=1)
_REMAT = flags.DEFINE_enum(
    "remat", "selective", ["selective", "full", "none"], "what the backward pass recomputes"
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 6, "number of rounds; the first is not timed", lower_bound=2
)
_OVERLAP = flags.DEFINE_bool(
    "overlap", True, "whether the next round is prepared while the devices are busy"
)


def main(argv):
    del argv
    import jax

    from fedrag_jax.data.batching import ANSWER_TOKENS
    from fedrag_jax.models.flops import decoder_flops

    kind = jax.devices()[0].device_kind
    network, params, adapters = decoder()
    flops = _BATCH.value * decoder_flops(
        network.config, network.lora, _TOKENS.value, ANSWER_TOKENS, trained=True
    )
    size = 1024 if jax.default_backend() == "cpu" else 8192
    best = product_peak([size], "bfloat16") * jax.device_count()
    published, speed = known(kind), {}
    print("clients  group  ms a client-step  of the best product")
    for count in map(int, _CLIENTS.value):
        seconds, group, waits = timed(network, params, adapters, count)
        speed[count] = round(1 / seconds, 2)
        print(
            f"{count:7d}{group:7d}{1e3 * seconds:18.2f}{flops / seconds / best:21.3f}", flush=True
        )
    report = {
        "fraction_of_product_peak": round(flops / seconds / best, 3),
        "mfu": published and round(flops / seconds / (published.peak * jax.device_count()), 3),
        "ms_per_client_step": round(1e3 * seconds, 3),
        "client_steps_per_second": speed,
        "device_waits": round(waits, 4),
        "product_tflops": round(best / 1e12, 2),
        "model": _MODEL.value,
        "clients": count,
        "group_size": group,
        "device": f"{jax.device_count()} x {kind}",
    }
    print(json.dumps(report))


def decoder():
    """`(network with adapters, params in bfloat16, adapters)`, random."""
    import jax
    import jax.numpy as jnp

    from fedrag_jax.models.decoder import Decoder, DecoderConfig
    from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
    from fedrag_jax.models.network import Network

    base = Network.of(Decoder, DecoderConfig(**MODELS[_MODEL.value], remat=_REMAT.value))
    network = add_lora(base, LoraConfig(_RANK.value, 2.0 * _RANK.value, TARGETS))
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.init(key)))
    return network, params(jax.random.key(0)), init_adapters(network, 0)


def timed(network, params, adapters, clients: int) -> tuple[float, int, float]:
    """(seconds a client-step, group size, share of the time in which the devices waited for the host):
    the median round."""
    import jax
    import numpy as np
    import optax

    from fedrag_jax.clock import Clock
    from fedrag_jax.data.batching import ANSWER_TOKENS
    from fedrag_jax.data.partition import Partition
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.callbacks import Callback
    from fedrag_jax.federated.engine.round import run_round
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.objectives.generator import AnswerLoss
    from fedrag_jax.objectives.task import Task

    each = _STEPS.value * _BATCH.value
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, network.config.vocab_size, (clients * each, 1, _TOKENS.value))
    answer = np.arange(_TOKENS.value - ANSWER_TOKENS, _TOKENS.value, dtype=np.int32)

    def collate(examples, _):
        rows = len(examples)
        return {
            "tokens": tokens[np.asarray(examples)].astype(np.int32),
            "lengths": np.full((rows, 1), _TOKENS.value, np.int32),
            "answer_positions": np.tile(answer, (rows, 1, 1)),
            "answer_mask": np.ones((rows, len(answer)), np.float32),
        }

    class Settings(Callback):
        def round_end(self, state, record):
            self.group_size = state.settings["group_size"]

    settings, devices = Settings(), jax.device_count()
    asking = fit.rounds(
        Task("round", {"adapters": adapters}, {"decoder": params}, AnswerLoss(network), collate),
        Partition(np.arange(clients * each), tuple(np.arange(clients * each).reshape(clients, -1))),
        fed_avg(local_steps=_STEPS.value),
        rounds=_ROUNDS.value,
        batch_size=_BATCH.value,
        optimizer=optax.adamw(1e-4),
        group_size=_GROUP.value or None,
        callbacks=[settings],
        mesh=jax.make_mesh((devices,), ("clients",)) if devices > 1 else None,
    )
    whole, busy, asked, clock = [], [], next(asking), Clock()
    for number in range(_ROUNDS.value):
        ran = run_round(asked if _OVERLAP.value else asked._replace(meanwhile=None))
        with contextlib.suppress(StopIteration):
            asked = asking.send(ran)
        took = clock.lap().others
        if number:
            whole.append(took)
            busy.append(ran.seconds)
    waits = statistics.median(1 - b / w for b, w in zip(busy, whole, strict=True))
    return statistics.median(whole) / (clients * _STEPS.value), settings.group_size, waits


if __name__ == "__main__":
    app.run(main)
