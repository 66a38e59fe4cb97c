"""Trains tasks in a regime and stores the results, so that no finished task is trained again."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import CheckpointError, DivergenceError
from fedrag_jax.federated.algorithm import nbytes
from fedrag_jax.federated.algorithms.by_name import FED_AVG, Named
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import FitResult
from fedrag_jax.federated.stopping import EarlyStopping, held_out_loss, read_evaluations
from fedrag_jax.federated.sweep import sweep
from fedrag_jax.files import DamagedError, kept, write_json, writing
from fedrag_jax.models import tensors
from fedrag_jax.models.lora import adapted_kernels
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.strategies import regimes
from fedrag_jax.strategies.regimes import Budget
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.ledger import Cost, training_cost
from fedrag_jax.tracking.logs import JsonlLog, Progress
from fedrag_jax.tracking.processes import everywhere


@dataclasses.dataclass
class Tuner:
    """The function `tune` of a strategy for one regime, one seed, and in the local regime one client.

    Attributes:
      folder: folder for each task's `tuned.safetensors`, `rounds.jsonl` and `cost.json`. A finished
        task is read back; a killed one resumes from its checkpoints.
      rates: `rates(task name, part) -> learning rate`.
      checkpoint_every: index refreshes between two checkpoints.
      validation: examples for the stopping rule, if the budget has one.
      algorithm: the algorithm of the federated regime.
      costs: costs of the requested tasks, in order, whether trained now or read back.
      labels: labels of the same tasks.
    """

    folder: pathlib.Path
    regime: str
    examples: list[Example]
    clients: Partition
    budget: Budget
    rates: Callable[[str, str], float]
    seed: int
    client: int | None = None
    checkpoint_every: int = 1
    validation: Sequence[Example] = ()
    algorithm: Named = FED_AVG
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, task: Task) -> PyTree:
        (trained,) = tune_together([(self, task)])
        if isinstance(trained, DivergenceError):
            raise trained
        return trained

    def where(self) -> str:
        """A description for messages: the regime, and the client if there is one."""
        return self.regime if self.client is None else f"{self.regime} client {self.client}"

    def finished(self, task: Task) -> bool:
        """Returns whether a task is finished; a damaged result is reported, and trained again."""
        cost = self.folder / task.name / "cost.json"
        return everywhere(kept(lambda _: self.read(task), cost) is not None)

    def read(self, task: Task) -> PyTree:
        """Reads the result of a finished task.

        Raises:
          DamagedError: one of its files is incomplete.
        """
        folder = self.folder / task.name
        self.costs[task.name] = Cost.read(folder / "cost.json")
        self.labels[task.name] = task.label or task.name
        try:
            return tensors.load_arrays(folder / "tuned.safetensors")
        except CheckpointError as error:
            raise DamagedError(folder / "tuned.safetensors", error.__cause__) from error

    def arguments(self, task: Task, *callbacks: Callback) -> dict[str, Any]:
        """Returns the arguments of `fit`; the fit resumes from its own checkpoints."""
        folder = self.folder / task.name
        stretch, stopping = self.budget.schedule(self.regime).refresh_every, self.budget.stopping
        # Processes that each have a folder of their own could not share a checkpoint.
        saved = [Checkpointer(folder / "checkpoints", self.checkpoint_every * stretch)]
        saved = saved if jax.process_count() == 1 else []
        if stopping:
            judge = held_out_loss(task, self.validation)
            every = stopping.every * stretch
            saved.append(EarlyStopping(judge, every, stopping.patience, folder))
        rates = {part: self.rates(task.name, part) for part in task.trainable}
        return regimes.arguments(
            task,
            self.regime,
            self.examples,
            self.clients,
            self.budget,
            rates,
            self.seed,
            callbacks=[*saved, JsonlLog(folder / "rounds.jsonl"), *callbacks],
            client=self.client,
            averaging=self.algorithm.averaging(task, rates),
        )

    def keep(self, task: Task, result: FitResult) -> None:
        """Writes the result of a fit, for `read`: the last parameters, or the best by validation.

        The base is included if the algorithm has changed it.
        """
        folder = self.folder / task.name
        cost, tuned = self._cost(task, result.history), result.trainable
        if self.budget.stopping:
            spent = sum(e["seconds"] for e in read_evaluations(folder / "validation.jsonl"))
            cost = cost._replace(validate_seconds=spent)
            tuned = tensors.load_arrays(folder / "best.safetensors")
        if self.regime == "federated" and self.algorithm.changes_base(task):
            base = adapted_kernels(result.frozen["decoder"], tuned["adapters"])
            tuned = tuned | {"decoder": base}
        with writing(folder / "tuned.safetensors"):
            tensors.save_arrays(tuned, folder / "tuned.safetensors")
        write_json(folder / "cost.json", cost._asdict())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "best.safetensors").unlink(missing_ok=True)

    def _cost(self, task: Task, history) -> Cost:
        schedule = self.budget.schedule(self.regime)
        return training_cost(
            task,
            history,
            task.table(self.examples[:1]),
            steps=schedule.local_steps * sum(len(record["clients"]) for record in history),
            batch_size=self.budget.batch_size,
        )


AT_ONCE = 2e9  # bytes of parameters and two moments of fits that are trained at once


def tune_together(asked: Sequence[tuple[Tuner, Task]]) -> list[PyTree | DivergenceError]:
    """Returns each tuner's result for its task; unfinished tasks are trained in sweeps."""
    failed = {}
    todo = [(tuner, task) for tuner, task in asked if not tuner.finished(task)]
    while todo:
        width = max(1, int(AT_ONCE / (3 * max(nbytes(task.trainable) for _, task in todo))))
        first = todo[0][0]
        if first.regime == "federated" and regimes.clients_mesh(first.budget.devices):
            width = 1  # its clients have the devices already
        some, todo = todo[:width], todo[width:]
        others = f" and {len(some) - 1} others" if len(some) > 1 else ""
        fits = [
            tuner.arguments(task, *([Progress(tuner.where() + others)] if i == 0 else []))
            for i, (tuner, task) in enumerate(some)
        ]
        for (tuner, task), result in zip(some, sweep(fits), strict=True):
            if isinstance(result, DivergenceError):
                failed[id(tuner)] = result
            else:
                tuner.keep(task, result)
    return [failed.get(id(tuner)) or tuner.read(task) for tuner, task in asked]
