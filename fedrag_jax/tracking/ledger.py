"""What training costs: seconds, floating-point operations, bytes between clients and server."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.models.decoder import DecoderConfig
from fedrag_jax.models.encoder import EncoderConfig
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.models.network import flatten, unflatten
from fedrag_jax.objectives.likelihood import answer_log_probs
from fedrag_jax.objectives.task import Task


class Cost(NamedTuple):
    """Of one training run; costs add up.

    Attributes:
      seconds: training, retrieval and refresh; `compile_seconds` lie beside it.
      flops: model formula of the training steps; `flops_compiler` is the compiler's count of one
        unrolled step, times steps.
      bytes_up, bytes_down: what the algorithm sends as stored, clients to server and back; 0 when
        nothing is federated.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    refresh_seconds: float = 0.0
    flops: float = 0.0
    flops_compiler: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def decoder_flops(
    config: DecoderConfig, lora: LoraConfig, tokens: int, answer: int, trained: bool
) -> float:
    """Operations of one sequence of T `tokens`, read at `answer` positions.

    A product of [m, n] and [n, p] counts 2mnp. With `trained` adapters over a frozen base, each
    frozen product is done once more for the gradient of its input, each product of two moving
    operands (attention, adapters) twice more. Of the last layer only keys and values are needed
    everywhere. Softmax, norms and activations are left out.
    """
    d, f = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q_proj": (d, heads), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (heads, d),
        "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d),
    }  # fmt: skip
    ranks = {n: r for n, r in lora.widths(config.num_layers).items() if n in shapes}
    frozen = moving = 0
    for read in [tokens] * (config.num_layers - 1) + [answer]:
        rows = {name: tokens if name in ("k_proj", "v_proj") else read for name in shapes}
        frozen += sum(2 * rows[name] * m * n for name, (m, n) in shapes.items())
        moving += sum(2 * rows[name] * ranks[name] * sum(shapes[name]) for name in ranks)
        moving += 4 * tokens * read * heads
    frozen += 2 * answer * d * config.vocab_size
    moving += 2 * answer * lora.widths(None).get("lm_head", 0) * (d + config.vocab_size)
    return frozen * (2 if trained else 1) + moving * (3 if trained else 1)


def encoder_flops(config: EncoderConfig, tokens: int, trained: bool) -> float:
    """Operations of one sequence of T `tokens`; full training costs three forward passes."""
    d, f, t = config.hidden_size, config.intermediate_size, tokens
    forward = config.num_layers * (2 * t * (4 * d * d + 2 * d * f) + 4 * t * t * d)
    return forward * (3 if trained else 1)


def step_flops(task: Task, table, batch_size: int) -> float:
    """Model formula of one local step of a task, from its networks and the shapes of its table.

    Likelihoods under a frozen generator count for each use, although one used twice is kept.
    """
    flops = 0.0
    if "prompt_tokens" in table:
        decoder = task.loss.decoder
        _, prompts, answer = table["answer_log_probs"].shape
        tokens = int(table["prompt_tokens"].max())
        flops += prompts * decoder_flops(
            decoder.config, decoder.lora, tokens, answer, trained=False
        )
    if "tokens" in table:
        decoder = task.loss.decoder
        _, prompts, tokens = table["tokens"].shape
        answer = table["answer_positions"].shape[-1]
        one = decoder_flops(decoder.config, decoder.lora, tokens, answer, trained=True)
        flops += prompts * one
    if "question_tokens" in table and "query" in task.trainable:
        width = table["question_tokens"].shape[1]
        flops += encoder_flops(task.loss.encoder.config, width, trained=True)
    return batch_size * flops


def compiler_flops(task: Task, table, batch_size: int) -> float:
    """The compiler's own count of one step, with the layers unrolled so that it sees each."""
    batch = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in table.items()}
    batch["weight"] = jax.ShapeDtypeStruct((batch_size,), np.float32)
    leaves, tree = jax.tree.flatten((task.trainable, task.frozen, batch))
    shapes = tuple(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves)
    count = _compiler_flops(task.loss, tree, shapes)
    if "prompt_tokens" in table:
        tokens = int(table["prompt_tokens"].max())
        count += _compiler_likelihoods(task.loss.decoder, batch["answer_log_probs"].shape, tokens)
    return count


@functools.lru_cache(maxsize=32)  # the clients of the local setting count the same program
def _compiler_flops(loss, tree, shapes) -> float:
    for name in ("decoder", "encoder"):
        network = getattr(loss, name, None)
        if network is not None:
            loss = dataclasses.replace(loss, **{name: network.unrolled()})
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = step.lower(*jax.tree.unflatten(tree, shapes), jax.random.key(0))
    return float(lowered.cost_analysis()["flops"])


@functools.lru_cache(maxsize=32)
def _compiler_likelihoods(decoder, shape, tokens: int) -> float:
    """Of the likelihoods [B, k, A] of answers under a frozen generator."""
    base, adapters = {}, {}
    for path, leaf in flatten(decoder.shapes()):
        (adapters if path[-1].startswith("lora_") else base)[path] = leaf
    batch = {
        "tokens": jax.ShapeDtypeStruct((*shape[:2], tokens), np.int32),
        "lengths": jax.ShapeDtypeStruct(shape[:2], np.int32),
        "answer_positions": jax.ShapeDtypeStruct(shape, np.int32),
    }
    run = jax.jit(functools.partial(answer_log_probs, decoder.unrolled()))
    lowered = run.lower(unflatten(base.items()), unflatten(adapters.items()), batch)
    return float(lowered.cost_analysis()["flops"])


def training_cost(task: Task, history: list[dict], table, *, steps: int, batch_size: int) -> Cost:
    """Of a finished fit.

    Args:
      history: its records.
      table: any rows of the task's table, for their shapes.
      steps: local steps of all clients in all rounds.
    """
    refresh = sum(r["refresh_seconds"] for r in history)
    return Cost(
        seconds=sum(r["seconds"] for r in history) + refresh,
        compile_seconds=sum(r["compile_seconds"] for r in history),
        refresh_seconds=refresh,
        flops=steps * step_flops(task, table, batch_size),
        flops_compiler=steps * compiler_flops(task, table, batch_size),
        bytes_up=sum(r["bytes_up"] for r in history),
        bytes_down=sum(r["bytes_down"] for r in history),
    )
