"""What a cell costs: seconds by part, operations, memory, tokens, bytes between clients and server."""

import dataclasses
import functools
import math
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import DataError
from fedrag_jax.federated.algorithm import added
from fedrag_jax.files import read_json
from fedrag_jax.models.decoder import DecoderConfig
from fedrag_jax.models.encoder import EncoderConfig
from fedrag_jax.models.lora import LoraConfig
from fedrag_jax.models.network import flatten, unflatten
from fedrag_jax.objectives.likelihood import answer_log_probs
from fedrag_jax.objectives.task import Task


class Cost(NamedTuple):
    """Costs add up, but for `peak_bytes`, of which the largest is kept.

    Attributes:
      seconds: training, elapsed, with all that it retrieves, collates and embeds anew on its way.
      device_seconds: the same, rounds times the devices that they held.
      retrieve_seconds, collate_seconds, train_seconds, aggregate_seconds: what those consist of;
        collating includes likelihoods under a frozen generator, aggregation all of a round that is no
        local step.
      embed_seconds: of passages, before training (as long as it took when they were embedded) and, as
        part of `seconds`, in it.
      validate_seconds: of deciding when to stop.
      evaluate_seconds, compile_seconds: beside them.
      flops: model formula of the training steps; `flops_compiler` is the compiler's count of one
        unrolled step, times steps.
      peak_bytes: of the largest round on a device, by the compiler.
      tokens: read by generator and query encoder in training steps, without padding.
      refreshes: how often the training questions were searched anew.
      traffic: what the algorithm sends, as stored: bytes by direction, part and type, such as
        "up adapters float32"; empty when nothing is federated.
      bytes_passages, bytes_vectors, bytes_questions: of the corpus and its index on their way to the
        clients, and of questions sent to be searched elsewhere.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    retrieve_seconds: float = 0.0
    collate_seconds: float = 0.0
    train_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    embed_seconds: float = 0.0
    validate_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    compile_seconds: float = 0.0
    flops: float = 0.0
    flops_compiler: float = 0.0
    peak_bytes: int = 0
    tokens: float = 0.0
    refreshes: int = 0
    traffic: Mapping[str, int] = {}
    bytes_passages: int = 0
    bytes_vectors: int = 0
    bytes_questions: int = 0

    @classmethod
    def read(cls, path: pathlib.Path) -> "Cost":
        """What `_asdict` wrote as JSON.

        Raises:
          DataError: as `of` does.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, fields: Mapping[str, Any], path: pathlib.Path) -> "Cost":
        """The cost with fields that were read from a file.

        Raises:
          DataError: there are others, as another version has.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise DataError(
                f"{path} was written by another version of fedrag_jax ({error}); remove its run, or "
                "choose another --config.name"
            ) from error

    @property
    def bytes_up(self) -> int:
        """Of what is trained, from all clients."""
        return sum(size for kind, size in self.traffic.items() if kind.startswith("up "))

    @property
    def bytes_down(self) -> int:
        """Of what is trained, to all clients."""
        return sum(size for kind, size in self.traffic.items() if kind.startswith("down "))

    def __add__(self, other: "Cost") -> "Cost":
        both = zip(self._fields, self, other, strict=True)
        return Cost(**{name: _ADDED.get(name, operator.add)(a, b) for name, a, b in both})


_ADDED = {"peak_bytes": max, "traffic": lambda *both: added(both)}


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The mean over runs, but for `peak_bytes`."""
    total, n = sum(costs, Cost()), len(costs)
    mean = {name: x / n for name, x in total._asdict().items() if name not in _ADDED}
    traffic = {kind: size / n for kind, size in total.traffic.items()}
    return total._replace(**mean, traffic=traffic)


def corpus_cost(passages: Sequence[Passage], vectors: np.ndarray, clients: int) -> Cost:
    """What it takes to have the passages and their index at every client, who searches at home."""
    text = sum(len(embedding_text(p).encode()) for p in passages)
    return Cost(bytes_passages=clients * text, bytes_vectors=clients * vectors.nbytes)


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
        prompts, answer = table["prompt_tokens"].shape[1], table["answer_mask"].shape[1]
        tokens = int(table["prompt_tokens"].max())
        flops += prompts * decoder_flops(
            decoder.config, decoder.lora, tokens, answer, trained=False
        )
    if "tokens" in table:
        decoder = task.loss.decoder
        _, prompts, tokens = table["tokens"].shape
        _, *read = table["answer_positions"].shape
        answer = math.prod(read) // prompts  # of a row, which may hold several packed prompts
        one = decoder_flops(decoder.config, decoder.lora, tokens, answer, trained=True)
        flops += prompts * one
    if "question_tokens" in table and "query" in task.trainable:
        width = table["question_tokens"].shape[1]
        flops += encoder_flops(task.loss.encoder.config, width, trained=True)
    if "document" in task.trainable:
        names = [n for n in ("positive", "negatives", "retrieved") if n in table]
        passages = sum(np.asarray(table[n]).reshape(len(table[n]), -1).shape[1] for n in names)
        width = task.frozen["passages"]["tokens"].shape[1]
        flops += passages * encoder_flops(task.loss.encoder.config, width, trained=True)
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
        prompts, answer = table["prompt_tokens"].shape[1], table["answer_mask"].shape[1]
        shape = batch_size, prompts, answer
        count += _compiler_likelihoods(task.loss.decoder, shape, tokens)
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

    def total(name):
        return sum(r[name] for r in history)

    seen = np.diff([0, *(r["examples"] for r in history)])
    tokens = sum(n * r["metrics"]["tokens"] for n, r in zip(seen, history, strict=True) if n)
    traffic = added(
        {
            f"{way} {kind}": size
            for way in ("up", "down")
            for kind, size in r["traffic"][way].items()
        }
        for r in history
    )
    embed, retrieve = total("embed_seconds"), total("retrieve_seconds")
    return Cost(
        seconds=total("seconds") + total("refresh_seconds"),
        device_seconds=total("device_seconds") + total("refresh_seconds"),
        retrieve_seconds=retrieve,
        collate_seconds=total("refresh_seconds") - retrieve - embed,
        train_seconds=total("seconds") - total("aggregate_seconds"),
        aggregate_seconds=total("aggregate_seconds"),
        embed_seconds=embed,
        compile_seconds=total("compile_seconds"),
        flops=steps * step_flops(task, table, batch_size),
        flops_compiler=steps * compiler_flops(task, table, batch_size),
        peak_bytes=max(r["peak_bytes"] for r in history),
        tokens=float(tokens),
        refreshes=total("refreshed"),
        traffic=traffic,
    )
