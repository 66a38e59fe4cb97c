"""The cost of a cell: seconds by part, operations, memory, tokens, bytes between clients and server."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.clock import Lap
from fedrag_jax.data.examples import Passage, embedding_text
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithm import added
from fedrag_jax.files import read_json
from fedrag_jax.objectives.task import Task


class Cost(NamedTuple):
    """The cost of a training. Costs can be added; `peak_bytes` becomes the maximum.

    `flops`, `flops_compiler` and `tokens` come from the declarations of objectives, and are None if a
    trained objective declares nothing.

    Attributes:
      seconds: elapsed training time, including retrieval, collating and re-embedding during training.
      device_seconds: seconds of the rounds multiplied by the number of devices they held.
      retrieve_seconds, collate_seconds, train_seconds, aggregate_seconds: the parts of `seconds`.
        Collating includes likelihoods under a frozen generator; aggregation includes everything in a
        round that is not a local step.
      embed_seconds: embedding of passages, before training (the original time if they were cached)
        and during training (also part of `seconds`).
      validate_seconds: validation for the stopping rule.
      evaluate_seconds, compile_seconds: evaluation and compilation, not part of `seconds`.
      flops: operations of the training steps by the model formula.
      flops_compiler: the compiler's count of one unrolled step, times the number of steps.
      peak_bytes: memory of the largest round on a device, by the compiler.
      tokens: tokens read by generator and query encoder in training steps, without padding.
      refreshes: number of retrievals for the training questions.
      traffic: bytes sent by the algorithm, as stored, by direction, part and type, such as
        "up adapters float32"; empty if nothing is federated.
      bytes_passages, bytes_vectors, bytes_questions: bytes of the corpus and its index sent to the
        clients, and of questions sent to other silos.
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
    flops: float | None = 0.0
    flops_compiler: float | None = 0.0
    peak_bytes: int = 0
    tokens: float | None = 0.0
    refreshes: int = 0
    traffic: Mapping[str, int] = {}
    bytes_passages: int = 0
    bytes_vectors: int = 0
    bytes_questions: int = 0

    @classmethod
    def read(cls, path: pathlib.Path) -> "Cost":
        """Reads a cost from a JSON file of `_asdict`.

        Raises:
          DataError: as `of` does.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of_evaluation(cls, lap: Lap) -> "Cost":
        """Returns the cost of an evaluation, from its time span."""
        return cls(evaluate_seconds=lap.others + lap.searching, compile_seconds=lap.compiling)

    @classmethod
    def of(cls, fields: Mapping[str, Any], path: pathlib.Path) -> "Cost":
        """Returns the cost with the fields read from a file.

        Raises:
          DataError: unknown or missing fields, from another version.
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
        """Bytes of trained parameters sent by all clients."""
        return sum(size for kind, size in self.traffic.items() if kind.startswith("up "))

    @property
    def bytes_down(self) -> int:
        """Bytes of trained parameters sent to all clients."""
        return sum(size for kind, size in self.traffic.items() if kind.startswith("down "))

    def __add__(self, other: "Cost") -> "Cost":
        both = zip(self._fields, self, other, strict=True)
        return Cost(**{name: _ADDED.get(name, _plus)(a, b) for name, a, b in both})


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


_ADDED = {"peak_bytes": max, "traffic": lambda *both: added(both)}


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Returns the mean over runs; for `peak_bytes`, the maximum."""
    total, n = sum(costs, Cost()), len(costs)
    known = {name: x for name, x in total._asdict().items() if x is not None}
    mean = {name: x / n for name, x in known.items() if name not in _ADDED}
    traffic = {kind: size / n for kind, size in total.traffic.items()}
    return total._replace(**mean, traffic=traffic)


def corpus_cost(passages: Sequence[Passage], vectors: np.ndarray, clients: int) -> Cost:
    """Returns the cost of sending the passages and their index to every client, for local search."""
    text = sum(len(embedding_text(p).encode()) for p in passages)
    return Cost(bytes_passages=clients * text, bytes_vectors=clients * vectors.nbytes)


def step_flops(task: Task, table, batch_size: int) -> float | None:
    """Returns the operations of one local step by the model formula; None if not declared."""
    flops = task.declared.flops
    return None if flops is None else batch_size * float(flops(task, table))


def compiler_flops(task: Task, table, batch_size: int) -> float | None:
    """Returns the compiler's operation count of one local step; None if not declared."""
    count = task.declared.compiler_flops
    return None if count is None else count(task, table, batch_size)


def tokens_read(task: Task, history: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the tokens of all examples seen; None if the objective declares no token metric.

    Raises:
      ConfigError: the loss does not return the declared metric.
    """
    metric = task.declared.tokens
    if metric is None:
        return None
    seen = np.diff([0, *(r["examples"] for r in history)])
    told = [(n, r["metrics"]) for n, r in zip(seen, history, strict=True) if n]
    for _, metrics in told:
        if metric not in metrics:
            raise ConfigError(
                f"task {task.name!r} declares that its metric {metric!r} counts tokens, but its loss "
                f"returns {[*metrics]}: return it, or declare another metric in StepCost"
            )
    return float(sum(n * metrics[metric] for n, metrics in told))


def training_cost(task: Task, history: list[dict], table, *, steps: int, batch_size: int) -> Cost:
    """Returns the cost of a finished fit.

    Args:
      history: the records of its rounds.
      table: any rows of the task's table, for their shapes.
      steps: number of local steps of all clients in all rounds.
    """

    def total(name):
        return sum(r[name] for r in history)

    def of_all(step):
        return None if step is None else steps * step

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
        flops=of_all(step_flops(task, table, batch_size)),
        flops_compiler=of_all(compiler_flops(task, table, batch_size)),
        peak_bytes=max(r["peak_bytes"] for r in history),
        tokens=tokens_read(task, history),
        refreshes=total("refreshed"),
        traffic=traffic,
    )
