"""What one training step minimises."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedrag_jax.clock import Spent

PyTree = Any
Table = Mapping[str, Any]


class Loss(Protocol):
    """What a step minimises: a pure function, the weighted mean over the examples of a batch."""

    def __call__(
        self, trainable: PyTree, frozen: PyTree, batch: dict[str, Any], rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The loss and what is told beside it, a scalar each.

        Args:
          batch: rows of the table, leading axis B, and `weight` float [B] (0 marks padding).
        """


class Collate(Protocol):
    """How examples become rows of the table."""

    def __call__(self, examples: Sequence[Any], retrieved: np.ndarray | None, /) -> dict[str, Any]:
        """Columns [N, ...]; row i is examples[i]; the same shapes at every call."""


class Retrieve(Protocol):
    """What examples find with what is trained."""

    def __call__(self, examples: Sequence[Any], trainable: PyTree, /, *index: Any) -> Any:
        """Rows int32 [N, k] of the knowledge store; with an index, those and the index after."""


class Idle(Protocol):
    """Why a client learns nothing from its examples."""

    def __call__(self, examples: Sequence[Any], batch_size: int, /) -> str:
        """A reason; "" where it learns.

        Raises:
          ConfigError: nobody could learn.
        """


class Flops(Protocol):
    """Operations by the formulas of networks."""

    def __call__(self, task: "Task", table: Table, /) -> float:
        """Of one example in a step, from the shapes of any rows of a table."""


class CompilerFlops(Protocol):
    """Operations by the compiler's own count."""

    def __call__(self, task: "Task", table: Table, batch_size: int, /) -> float:
        """Of a step."""


class StepCost(NamedTuple):
    """What a training step takes, as the objective declares it; what is None is empty in every table.

    Attributes:
      loss: that it is about: a task that is given another loss has to declare another cost.
      tokens: the metric of the loss that says how many tokens its networks read of an example, without
        padding.
    """

    loss: Loss
    flops: Flops | None = None
    compiler_flops: CompilerFlops | None = None
    tokens: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss, the arrays it is about, and the way examples become its batches.

    Attributes:
      name: for logs and file names.
      trainable: pytree that the optimizer moves.
      frozen: pytree shared by all clients; no gradient is taken for it.
      loss: tasks built from the same networks and settings carry an equal one, so that one compiled
        program serves them all.
      retrieve: asked again whenever what is trained moves the vectors searched; None if nothing is
        retrieved.
      index: {name: array}, what is searched at first; then it is
        `retrieve(examples, trainable, index) -> (rows, index)`, each time with the index that the time
        before left. None where `retrieve` sees to it that its index is fresh.
      cost: what a step of this loss takes, where somebody declares it.
      idle: None where any example teaches something.
      label: what figures call it; the name if empty.
      spent: what `retrieve` tells of the seconds that it takes, if it does.
      judged: the metric, the higher the better, by which held-out examples decide when to stop; the
        loss if empty.
    """

    name: str
    trainable: PyTree
    frozen: PyTree
    loss: Loss
    collate: Collate
    retrieve: Retrieve | None = None
    index: dict[str, Any] | None = None
    cost: StepCost | None = None
    idle: Idle | None = None
    label: str = ""
    spent: Spent | None = None
    judged: str = ""

    @property
    def declared(self) -> StepCost:
        """The cost of a step; one that says nothing where it is declared for no loss or for another."""
        if self.cost is None or self.cost.loss != self.loss:
            return StepCost(self.loss)
        return self.cost

    def table(self, examples) -> dict[str, Any]:
        """What `collate` makes of examples before anything is trained."""
        if self.retrieve is None:
            return self.collate(examples, None)
        if not self.index:
            return self.collate(examples, self.retrieve(examples, self.trainable))
        rows, _ = self.retrieve(examples, self.trainable, self.index)
        return self.collate(examples, rows)
