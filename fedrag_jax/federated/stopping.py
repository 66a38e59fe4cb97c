"""Early stopping by held-out questions; the best model is kept."""

import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.json_lines import json_rows
from fedrag_jax.data.seeds import stream
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.files import write_text
from fedrag_jax.models import tensors
from fedrag_jax.objectives.task import PyTree, Task

HELD_OUT_BATCH = 32  # questions scored at once; a ranking loss takes its negatives from these


class Judge(Protocol):
    """Scores parameters."""

    def __call__(self, trainable: PyTree, index: dict[str, Any] | None, /) -> float: ...


class EarlyStopping(Callback):
    """Ends a fit that has stopped improving, and keeps the best parameters.

    The start counts as an evaluation: a fit that never improves on it returns the initial parameters.
    A resumed fit continues with the evaluations in its folder; a fit from round 0 removes those of an
    earlier one. A loss that is not finite is worse than any other.

    Args:
      judge: `judge(trainable, index) -> float` for NumPy arrays and the index of the last retrieval
        (None if there is none); lower is better.
      every: rounds between two evaluations.
      patience: the fit ends after this many evaluations in a row without a new best.
      folder: folder of `validation.jsonl` (one line per evaluation: `round`, `loss`, `seconds`) and
        `best.safetensors`.

    Raises:
      ConfigError: `every` or `patience` below 1; in a fit, an algorithm that leaves models with its
        clients or changes the base.
    """

    needs_whole_model = True

    def __init__(
        self,
        judge: "Judge",
        every: int,
        patience: int,
        folder: pathlib.Path,
    ):
        if every < 1 or patience < 1:
            raise ConfigError(
                f"EarlyStopping: every and patience must be at least 1, got {every} and {patience}"
            )
        self.judge, self.every, self.patience = judge, every, patience
        self.log, self.kept = folder / "validation.jsonl", folder / "best.safetensors"
        self.evaluations: list[dict[str, float]] = []

    def start(self, state):
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if not state.round:
            self.kept.unlink(missing_ok=True)  # of another fit
        # Without the best parameters, their loss is nothing to improve on.
        known = read_evaluations(self.log) if self.kept.exists() else []
        # Rounds after the checkpoint are made again, to the same parameters, and judged again.
        self.evaluations = [e for e in known if e["round"] <= state.round]
        seen = {e["round"] for e in self.evaluations}
        if not seen or (state.round % self.every == 0 and state.round not in seen):
            self._evaluate(state)
        return state

    def round_end(self, state, record) -> bool:
        last = state.round == record["rounds"]
        if state.round % self.every == 0 or last:
            self._evaluate(state)
        return self.stopped

    @property
    def best(self) -> dict[str, float]:
        """The evaluation of the kept parameters."""
        return min(self.evaluations, key=_comparable)

    @property
    def stopped(self) -> bool:
        """Whether patience is exhausted."""
        if not self.evaluations:  # before the fit starts
            return False
        after = [e for e in self.evaluations if e["round"] > self.best["round"]]
        return len(after) >= self.patience

    def trainable(self) -> PyTree:
        """The kept parameters."""
        return tensors.load_arrays(self.kept)

    def _evaluate(self, state) -> None:
        began = time.perf_counter()
        trainable = jax.device_get(state.state.trainable)
        loss = float(self.judge(trainable, state.index))
        found = {"round": state.round, "loss": loss, "seconds": time.perf_counter() - began}
        self.evaluations.append(found)
        if self.best is found:
            tensors.save_arrays(trainable, self.kept)
        write_text(self.log, "".join(json.dumps(e) + "\n" for e in self.evaluations))


def _comparable(evaluation: dict[str, float]) -> float:
    loss = evaluation["loss"]
    return loss if math.isfinite(loss) else math.inf


def read_evaluations(path: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of a `validation.jsonl`; none if the file does not exist."""
    if not path.exists():
        return []
    return [evaluation for evaluation, _ in json_rows(path)]


def held_out_loss(task: Task, examples: Sequence[Any], batch_size: int = HELD_OUT_BATCH) -> Judge:
    """Returns the judge by a task's own loss: its mean over held-out examples, or that of the negative
    of the metric that the task names for this.

    The task retrieves again with the evaluated parameters, from the index of the training, so that a
    resumed training is judged alike.

    Raises:
      DataError: no examples.
    """
    if not examples:
        raise DataError(f"{task.name}: no validation questions to decide when to stop; give some")
    order = stream(0, "held-out batches").permutation(len(examples))
    shuffled = [examples[i] for i in order]  # files are sorted: neighbours would be negatives
    frozen = jax.tree.map(jnp.asarray, task.frozen)
    now: dict[str, Any] = {"rows": None, "table": None}

    def judge(trainable: PyTree, index: dict[str, Any] | None = None) -> float:
        rows = task.rows(shuffled, trainable, index)
        if now["table"] is None or not np.array_equal(rows, now["rows"]):
            now["rows"], now["table"] = rows, task.collate(shuffled, rows)
        total = 0.0
        for start in range(0, len(shuffled), batch_size):
            places = np.arange(start, start + batch_size)
            weight = (places < len(shuffled)).astype(np.float32)
            batch = {name: column[places % len(shuffled)] for name, column in now["table"].items()}
            loss, told = _compiled(task.loss)(
                trainable, frozen, batch | {"weight": weight}, jax.random.key(0)
            )
            judged = -told[task.judged] if task.judged else loss
            total += float(judged) * weight.sum()
        return total / len(shuffled)

    return judge


@functools.lru_cache(maxsize=32)
def _compiled(loss):
    return jax.jit(loss)
