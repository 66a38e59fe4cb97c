"""Trains tasks in a setting and keeps what came out, so that nothing finished is done again."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import jax

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition
from fedrag_jax.models import hub
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.strategies.settings import Budget, train
from fedrag_jax.tracking.checkpoints import Checkpointer
from fedrag_jax.tracking.ledger import Cost, training_cost
from fedrag_jax.tracking.logs import JsonlLog, Progress
from fedrag_jax.tracking.processes import everywhere


@dataclasses.dataclass
class Tuner:
    """The `tune` of a strategy: one setting, one seed, and in the local setting one client.

    Attributes:
      folder: where each task leaves `tuned.safetensors`, `rounds.jsonl` and `cost.json`. A task that
        is finished there is read back; one that was killed resumes from its checkpoints.
      rates: `rates(task name, part) -> learning rate`.
      checkpoint_every: index refreshes between two checkpoints.
      costs: of each task asked for, in order, whether trained now or read back.
    """

    folder: pathlib.Path
    setting: str
    examples: list[Example]
    clients: Partition
    budget: Budget
    rates: Callable[[str, str], float]
    seed: int
    client: int | None = None
    checkpoint_every: int = 1
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def __call__(self, task: Task) -> PyTree:
        folder = self.folder / task.name
        done = folder / "cost.json"
        if not everywhere(done.exists()):
            self._train(task, folder)
        self.costs[task.name] = Cost(**json.loads(done.read_text()))
        return hub.load_arrays(folder / "tuned.safetensors")

    def _train(self, task: Task, folder: pathlib.Path) -> None:
        where = self.setting if self.client is None else f"{self.setting} client {self.client}"
        checkpoints = folder / "checkpoints"
        stretch = self.budget.clients if self.setting == "centralised" else 1
        # Processes that each have a folder of their own could not share a checkpoint.
        saved = [Checkpointer(checkpoints, self.checkpoint_every * stretch)]
        saved = saved if jax.process_count() == 1 else []
        result = train(
            task,
            self.setting,
            self.examples,
            self.clients,
            self.budget,
            {part: self.rates(task.name, part) for part in task.trainable},
            self.seed,
            callbacks=[*saved, JsonlLog(folder / "rounds.jsonl"), Progress(where)],
            client=self.client,
        )
        cost = self._cost(task, result.history)
        hub.save_arrays(result.trainable, folder / "tuned.safetensors")
        beside = folder / "cost.json.tmp"
        beside.write_text(json.dumps(cost._asdict()) + "\n")
        beside.replace(folder / "cost.json")
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _cost(self, task: Task, history) -> Cost:
        some = self.examples[:1]
        table = task.collate(some, task.retrieve and task.retrieve(some, task.trainable))
        budget = self.budget
        clients = 1 if self.setting == "local" else budget.clients
        return training_cost(
            task,
            history,
            table,
            steps=budget.rounds * budget.local_steps * clients,
            batch_size=budget.batch_size,
        )
