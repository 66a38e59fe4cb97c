"""Client-steps per second of a federated LoRA round, compared with PyTorch on the same CPU.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.federated_round
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.federated_round --clients=8 --repeats=9
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.federated_round --model=smollm2

Both average the same adapters on all linear layers of the same decoder, in float32, after the same
local steps of AdamW on the same batches. Both must produce the same adapters. PyTorch trains one client
after another in one model (`torch_round.py`). Each side computes logits either at all positions, as
users write it, or only where an answer token is predicted. They take turns, and the first turn of each
is not counted. Prints medians as a table, and a line of JSON about the last number of clients. Progress
goes to standard error, because the programs of a large model take minutes to compile. Times are those
of whole calls: `fit` also collates its table and reports its losses.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from experiments.benchmarks.peak import product_peak
from experiments.launch import virtual_devices
from fedrag_jax.models.network import WRITTEN_OUT

_MODEL = flags.DEFINE_string(
    "model",
    "",
    "name of a decoder to use instead of a random one of the sizes below; the "
    "defaults are then 8 clients and sequences of 256 tokens, 12 of them answers",
)
_CLIENTS = flags.DEFINE_list("clients", None, "clients per round; each number is a row (1,8,32)")
_STEPS = flags.DEFINE_integer("local_steps", 2, "steps per client and round", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "number of sequences per step", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "tokens of a sequence with its answer (128)", lower_bound=3
)
_ANSWER = flags.DEFINE_integer(
    "answer_tokens", None, "tokens of the answer, at the end of the sequence (16)", lower_bound=1
)
_LAYERS = flags.DEFINE_integer("layers", 6, "number of layers of the decoder", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "hidden size of the decoder", lower_bound=2)
_INTERMEDIATE = flags.DEFINE_integer(
    "intermediate_size", 1024, "intermediate size of the decoder", lower_bound=1
)
_HEADS = flags.DEFINE_integer(
    "heads", 8, "number of attention heads; none share keys and values", lower_bound=1
)
_VOCABULARY = flags.DEFINE_integer(
    "vocabulary", 8192, "vocabulary size of the decoder", lower_bound=2
)
_RANK = flags.DEFINE_integer("rank", 16, "rank of the adapters", lower_bound=1)
_GROUP = flags.DEFINE_integer(
    "group_size", 1, "clients trained side by side (ours only)", lower_bound=1
)
_MODES = flags.DEFINE_list(
    "compile",
    None,
    "modes of torch.compile to try besides eager; none if empty; default: `default` "
    "if our layers are unrolled, because it compiles layer by layer too",
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    2,
    "number of virtual devices over which the clients are distributed (ours only)",
    lower_bound=1,
)
_UNROLL = flags.DEFINE_bool(
    "unroll",
    None,
    "unroll layers and keep their outputs (ours only); default: unroll networks "
    "shallow enough to compile (`Network.written_out`)",
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "number of turns per side", lower_bound=1)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# A large eps, because steps of Adam hang on the signs of gradients that are rounding errors: of SmolLM2
# PyTorch's own two ways come to adapters that are 2.6e-5 apart at an eps of 1e-4.
ADAMW = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 1e-2}
SIZES = 512, 1024, 2048, 4096  # of the products whose speed is the machine's


def clients() -> list[int]:
    """Returns the numbers of clients of the timed rounds."""
    return list(map(int, _CLIENTS.value or (["8"] if _MODEL.value else ["1", "8", "32"])))


def devices() -> int:
    """Virtual ones of ours."""
    return _DEVICES.value


def length() -> int:
    """Tokens of a sequence."""
    return _TOKENS.value or (256 if _MODEL.value else 128)


def answer() -> int:
    """Tokens of an answer."""
    return _ANSWER.value or (12 if _MODEL.value else 16)


def main(argv):
    del argv
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("peft") is None:
        raise SystemExit(
            "this compares with PyTorch, which is not here: pip install torch==2.13.0 peft==0.21.2"
        )
    virtual_devices(_DEVICES.value)
    import jax

    network, params, adapters = decoder()
    say(f"a decoder of {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    written = "written out" if network.config.unroll else "in a loop"
    tried = ", ".join(["eager", *(f"compiled ({mode})" for mode in modes(network))])
    ways = f"{written}, remat {network.config.remat}"
    say(f"our {network.config.num_layers} layers are {ways}; PyTorch is tried {tried}")
    counts = clients()
    tokens = batches(max(counts), network.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        theirs, tried = pytorch(network, params, adapters, tokens, pathlib.Path(folder))
    runs = {
        "ours_full": ours(network, params, adapters, answers_only=False),
        "pytorch_full": theirs["full"],
        "ours_answers": ours(network, params, adapters, answers_only=True),
        "pytorch_answers": theirs["answers"],
    }
    for name, seconds in tried.items():
        print(f"PyTorch, {name}: {1e3 * seconds:.1f} ms a step")
    print("milliseconds a client-step\n" + "".join(f"{n:>17}" for n in ("clients", *runs)))
    for count in counts:
        require_equal({name: first(name, run, tokens[:count]) for name, run in runs.items()})
        say(f"{_REPEATS.value} turns of each, {count} clients")
        seconds = times(runs, tokens[:count])
        print(f"{count:17}" + "".join(f"{1e3 * s:17.1f}" for s in seconds.values()), flush=True)
    best = peak()
    report = {
        "vs_pytorch_full": seconds["pytorch_full"] / seconds["ours_full"],
        "vs_pytorch_answers": seconds["pytorch_answers"] / seconds["ours_answers"],
        "vs_pytorch_as_users_write_it": seconds["pytorch_full"] / seconds["ours_answers"],
        "fraction_of_peak": operations(network, True) / seconds["ours_answers"] / best,
        "fraction_of_peak_full": operations(network, False) / seconds["ours_full"] / best,
    }
    report = {name: round(value, 3) for name, value in report.items()} | {
        "clients": count,
        "ms_per_client_step": {name: round(1e3 * s, 2) for name, s in seconds.items()},
        "peak_gflops": round(best / 1e9, 1),
        "gflop_per_step": round(operations(network, True) / 1e9, 3),
        "pytorch": {name: theirs[name].name for name in theirs},
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(report))


def say(what: str) -> None:
    """Prints progress to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def first(name: str, run, tokens):
    """Returns the result of the first run, which may compile."""
    say(f"{name}, {len(tokens)} clients: first turn; what is not compiled yet is")
    start = time.perf_counter()
    found = run(tokens)
    say(f"{name}, {len(tokens)} clients: {time.perf_counter() - start:.1f} s")
    return found


def modes(network) -> list[str]:
    """Returns the modes of torch.compile to try."""
    if _MODES.value is None:
        return ["default"] if network.config.num_layers <= WRITTEN_OUT else []
    return [*filter(None, _MODES.value)]


def times(runs, tokens) -> dict[str, float]:
    """Seconds a client-step: medians over turns."""
    seconds = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run(tokens)
            seconds[name].append(time.perf_counter() - start)
    return {n: statistics.median(s) / (len(tokens) * _STEPS.value) for n, s in seconds.items()}


def require_equal(results) -> None:
    """Ends the program where the sides differ: mean adapters by name, and the loss of a client."""
    mine, losses = results["ours_answers"]
    for name, (adapters, found) in results.items():
        apart = max(np.abs(x - mine[key]).max() for key, x in adapters.items())
        loss_apart = np.abs(np.subtract(found, losses)).max() / answer()
        # A step of AdamW moves a number by `lr` at most; rounding may move it by a hundredth of that.
        if adapters.keys() != mine.keys() or apart > 0.01 * ADAMW["lr"] or loss_apart > 1e-4:
            raise SystemExit(
                f"{name} and ours_answers differ by {apart:.1e} in adapters and {loss_apart:.1e} in "
                "loss a token; nothing to time"
            )


def decoder():
    """`(network with adapters, params, adapters)`; no B is zero, or A would get no gradient."""
    import jax

    from fedrag_jax.models import hub
    from fedrag_jax.models.decoder import Decoder, DecoderConfig
    from fedrag_jax.models.lora import LoraConfig, add_lora, init_adapters
    from fedrag_jax.models.network import Network, flatten, unflatten

    config = DecoderConfig(
        vocab_size=_VOCABULARY.value,
        hidden_size=_HIDDEN.value,
        intermediate_size=_INTERMEDIATE.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
        num_kv_heads=_HEADS.value,
        head_dim=_HIDDEN.value // _HEADS.value,
    )
    key, params = jax.random.key(0), None
    base = Network.of(Decoder, config)
    if _MODEL.value:
        model = hub.given(_MODEL.value, "model", "decoder")
        base, params = model.network, model.params
    always = {None: WRITTEN_OUT, True: base.config.num_layers, False: 0}
    base = base.written_out(always[_UNROLL.value])
    network = add_lora(base, LoraConfig(_RANK.value, 2.0 * _RANK.value, TARGETS))
    adapters = unflatten(
        (path, x if path[-1] == "lora_a" else 0.01 * jax.random.normal(key, x.shape))
        for path, x in flatten(init_adapters(network, key))
    )
    return network, base.init(key) if params is None else params, adapters


def batches(count: int, vocabulary: int) -> np.ndarray:
    """Random tokens [K, S, B, T]."""
    shape = count, _STEPS.value, _BATCH.value, length()
    return np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)


def ours(network, params, adapters, answers_only: bool):
    """`run(tokens [K, S, B, T]) -> (mean adapters by PEFT's names, losses of the clients)`."""
    import jax
    import optax

    from fedrag_jax.data.partition import Partition
    from fedrag_jax.federated.algorithms.fed_avg import fed_avg
    from fedrag_jax.federated.engine.cohort import sample_cohort
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.federated.optimizers import tunable
    from fedrag_jax.objectives.generator import AnswerLoss
    from fedrag_jax.objectives.task import Task

    rates = {"learning_rate" if name == "lr" else name: value for name, value in ADAMW.items()}
    optimizer, algorithm = tunable(optax.adamw, **rates), fed_avg(local_steps=_STEPS.value)

    def run(tokens):
        rows = np.arange(tokens[..., 0].size).reshape(len(tokens), -1)
        data = Partition(np.arange(rows.size), tuple(rows))
        walked = sample_cohort(data, algorithm.work, 0, _BATCH.value, 0).indices
        table = np.empty((rows.size, *tokens.shape[3:]), np.int32)
        table[walked] = tokens  # so that `fit`, which shuffles, takes the batches in their order
        task = Task(
            name="benchmark",
            trainable={"adapters": adapters},
            frozen={"decoder": params},
            loss=AnswerLoss(network),
            collate=lambda examples, _: columns(table[np.asarray(examples)], answers_only),
        )
        options = {"rounds": 1, "batch_size": _BATCH.value, "group_size": _GROUP.value}
        if _DEVICES.value > 1:
            options["mesh"] = jax.make_mesh((_DEVICES.value,), ("clients",))
        found = fit(task, data, algorithm, optimizer=optimizer, **options)
        return by_name(found.trainable["adapters"]), found.history[0]["client_loss"]

    return run


def columns(tokens: np.ndarray, answers_only: bool) -> dict[str, np.ndarray]:
    """The table of `AnswerLoss` for tokens [N, T]: all but the first are scored, or answers only."""
    n, t = tokens.shape
    scored = np.arange(t - answer() if answers_only else 1, t, dtype=np.int32)
    return {
        "tokens": tokens[:, None],
        "lengths": np.full((n, 1), t, np.int32),
        "answer_positions": np.tile(scored, (n, 1, 1)),
        "answer_mask": np.tile((scored >= t - answer()).astype(np.float32), (n, 1)),
    }


def by_name(adapters: dict) -> dict[str, np.ndarray]:
    """Matrices of every layer under PEFT's names, stored as it does: `model.layers.0....lora_A`."""
    from fedrag_jax.models.network import flatten

    found = {}
    for (_, part, name, matrix), array in flatten(adapters):
        for i, layer in enumerate(np.asarray(array)):
            module = f"model.layers.{i}.{'self_attn' if part == 'attention' else part}.{name}"
            found[f"{module}.lora_{matrix[-1].upper()}"] = layer.T
    return found


def pytorch(network, params, adapters, tokens, folder: pathlib.Path):
    """The fastest way to compute the logits of all and of answers, and seconds a step of all tried."""
    from experiments.benchmarks import torch_round

    save(network, params, adapters, folder)
    found, tried = {}, {}
    for kind in ("full", "answers"):
        run, seconds = torch_round.fastest(
            (None, *modes(network)),
            tokens,
            say,
            folder=folder / "decoder",
            adapters=folder / "adapters",
            scored=kind == "answers",
            answer=answer(),
            **ADAMW,
        )
        found[kind] = run
        tried |= {f"{kind}, {name}": s for name, s in seconds.items()}
    return found, tried


def save(network, params, adapters, folder: pathlib.Path) -> None:
    """Writes `decoder` and `adapters`, as PyTorch reads them."""
    from fedrag_jax.models import hub, peft

    tokenizer = hub.load("builtin:decoder").tokenizer  # a checkpoint has one; nothing is tokenised
    hub.save(hub.Pretrained(network, params, tokenizer, "benchmark"), folder / "decoder")
    peft.save(adapters, network, folder / "adapters")


def operations(network, answers_only: bool) -> float:
    """Returns the floating-point operations of a local step."""
    c, scored = network.config, answer() if answers_only else length() - 1
    return _BATCH.value * products(
        c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size, _RANK.value, length(), scored,
        c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim,
    )  # fmt: skip


def products(
    layers, hidden, intermediate, vocabulary, rank, tokens, scored, queries=None, keys=None
) -> float:
    """Returns the floating-point operations of the matrix products of one sequence in a LoRA step.

    A multiplication and an addition are two. Of a layer with P frozen numbers in its matrices, R in
    their adapters and attention of width D,

    - each token takes 2 P forward and 2 P backward, as frozen matrices get no gradient, and 6 R, as
      adapters do: forward, backward, gradient;
    - each pair of a token and one not after it takes 4 D forward, for score and mixture, and 8 D
      backward.

    A scored position takes 2 D V forward and 2 D V backward, V the size of the vocabulary. The last
    layer needs the keys and values of all tokens, but the rest at scored positions alone. What is
    computed twice, or for nothing, does not count.

    Args:
      queries, keys: widths of all heads together, of queries and of keys and values; `hidden` each.
    """
    d, f, t = hidden, intermediate, tokens
    q, k = queries or d, keys or d

    def linear(*sizes):
        return sum(4 * i * o + 6 * rank * (i + o) for i, o in sizes)

    keys_values, others = linear((d, k), (d, k)), linear((d, q), (q, d), (d, f), (d, f), (f, d))
    layer = t * (keys_values + others) + 12 * q * t * (t + 1) / 2
    last = t * keys_values + scored * others + 12 * q * sum(range(t - scored, t))
    return (layers - 1) * layer + last + 4 * scored * d * vocabulary


def peak() -> float:
    """Floating-point operations a second of the best float32 product of JAX or PyTorch here."""
    from experiments.benchmarks import torch_round

    return max(torch_round.peak(SIZES), product_peak(SIZES, "float32"))


if __name__ == "__main__":
    app.run(main)
