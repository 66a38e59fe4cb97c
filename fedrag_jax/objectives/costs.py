"""Components from which objectives declare the cost of their steps."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.models.flops import decoder_flops, encoder_flops
from fedrag_jax.models.network import Network, flatten, unflatten
from fedrag_jax.objectives.task import StepCost, Table, Task


def declared(
    loss: Callable,
    unrolled: Callable[[], Callable],
    flops: Callable[[Task, Table], float],
    asked: Callable[[Task], Network | None] = lambda task: None,
) -> StepCost:
    """Returns the cost of a loss with the metric `tokens`.

    Args:
      unrolled: `unrolled()`: the same loss with unrolled layers, for the compiler's count.
      flops: operations of one example, by formula.
      asked: `asked(task)`: the frozen generator whose likelihoods of `prompt_tokens` a step needs.
        Every use counts, although repeated likelihoods are cached.
    """

    def compiler_flops(task, table, batch_size):
        count, decoder = counted(unrolled(), task, table, batch_size), asked(task)
        return count if decoder is None else count + _likelihoods(decoder, table, batch_size)

    return StepCost(loss, flops, compiler_flops, "tokens")


# --- by formula, of one example -----------------------------------------------------------------


def trained_reading(decoder: Network, table: Table) -> float:
    """Operations of reading prompts `tokens` [N, K, T] for their answers, with the adapters'
    gradient."""
    _, prompts, tokens = table["tokens"].shape
    _, *read = table["answer_positions"].shape
    answer = math.prod(read) // prompts  # of a row, which may hold several packed prompts
    one = decoder_flops(decoder.config, decoder.lora, tokens, answer, trained=True)
    return prompts * one


def frozen_reading(decoder: Network, table: Table) -> float:
    """Operations of a frozen generator on prompts of `prompt_tokens` [N, K], all counted as the
    largest."""
    prompts, answer = table["prompt_tokens"].shape[1], table["answer_mask"].shape[1]
    tokens = int(table["prompt_tokens"].max())
    return prompts * decoder_flops(decoder.config, decoder.lora, tokens, answer, trained=False)


def trained_encoding(encoder: Network, task: Task, table: Table, *passages: str) -> float:
    """Operations of encoding the question, if the query encoder is trained, and passages, if the
    document encoder is trained.

    Args:
      passages: columns with the corpus rows [N] or [N, k] of encoded passages.
    """
    flops = 0.0
    if "query" in task.trainable:
        width = table["question_tokens"].shape[1]
        flops += encoder_flops(encoder.config, width, trained=True)
    if "document" in task.trainable:
        count = sum(np.asarray(table[n]).reshape(len(table[n]), -1).shape[1] for n in passages)
        # Of a large corpus a batch brings what it reads.
        read = task.frozen.get("passages", {"tokens": table.get(f"{passages[0]}_tokens")})
        width = read["tokens"].shape[-1]
        flops += count * encoder_flops(encoder.config, width, trained=True)
    return flops


# --- by the compiler, of a step -----------------------------------------------------------------


def counted(loss: Callable, task: Task, table: Table, batch_size: int) -> float:
    """Operations of a loss and its gradient on a batch of a task, by the compiler's count.

    Args:
      loss: the loss, hashable and with unrolled layers, because the compiler counts a loop once.
    """
    batch = {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in table.items()}
    batch["weight"] = jax.ShapeDtypeStruct((batch_size,), np.float32)
    leaves, tree = jax.tree.flatten((task.trainable, task.frozen, batch))
    shapes = tuple(jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in leaves)
    return _counted(loss, tree, shapes)


@functools.lru_cache(maxsize=32)  # the clients of the local setting count the same program
def _counted(loss, tree, shapes) -> float:
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = step.lower(*jax.tree.unflatten(tree, shapes), jax.random.key(0))
    return float(lowered.cost_analysis()["flops"])


def _likelihoods(decoder: Network, table: Table, batch_size: int) -> float:
    prompts, answer = table["prompt_tokens"].shape[1], table["answer_mask"].shape[1]
    return _counted_likelihoods(
        decoder, (batch_size, prompts, answer), int(table["prompt_tokens"].max())
    )


@functools.lru_cache(maxsize=32)
def _counted_likelihoods(decoder, shape, tokens: int) -> float:
    """Operations of the likelihoods [B, k, A] of answers under a frozen generator."""
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
