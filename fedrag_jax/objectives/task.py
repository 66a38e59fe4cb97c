"""The type `Task`: a loss, its parameters, and its batches."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedrag_jax.clock import Spent

PyTree = Any
Table = Mapping[str, Any]


class Loss(Protocol):
    """A loss: a pure function that returns the weighted mean over the examples of a batch."""

    def __call__(
        self, trainable: PyTree, frozen: PyTree, batch: dict[str, Any], rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the loss and a dictionary of metrics, all scalars.

        Args:
          batch: rows of the table, leading axis B, and `weight` float [B] (0 marks padding).
        """


class Collate(Protocol):
    """Converts examples to rows of the table."""

    def __call__(self, examples: Sequence[Any], retrieved: np.ndarray | None, /) -> dict[str, Any]:
        """Returns columns [N, ...]; row i is examples[i]; shapes are the same in every call."""


class Retrieve(Protocol):
    """Retrieves passages for examples with the current parameters."""

    def __call__(self, examples: Sequence[Any], trainable: PyTree, /, *index: Any) -> Any:
        """Returns corpus rows int32 [N, k]; with an index, also the updated index."""


class Idle(Protocol):
    """Explains why a client would learn nothing from its examples."""

    def __call__(self, examples: Sequence[Any], batch_size: int, /) -> str:
        """Returns the reason; "" if the client learns.

        Raises:
          ConfigError: no client could learn.
        """


class Flops(Protocol):
    """Counts operations by the formulas of networks."""

    def __call__(self, task: "Task", table: Table, /) -> float:
        """Returns the operations of one example in a step, from the shapes of any rows of a table."""


class CompilerFlops(Protocol):
    """Counts operations with the compiler."""

    def __call__(self, task: "Task", table: Table, batch_size: int, /) -> float:
        """Returns the operations of a step."""


class StepCost(NamedTuple):
    """The declared cost of a training step; values of None are empty cells in every table.

    Attributes:
      loss: the loss of this cost; a task whose loss is replaced needs another declaration.
      tokens: the metric of the loss that counts the tokens its networks read per example, without
        padding.
    """

    loss: Loss
    flops: Flops | None = None
    compiler_flops: CompilerFlops | None = None
    tokens: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss, its parameters, and the functions that convert examples to batches.

    Attributes:
      name: name for logs and file names.
      trainable: pytree of trained parameters.
      frozen: pytree shared by all clients; no gradient is taken for it.
      loss: the loss; tasks built from the same networks and settings have equal losses, so that they
        share one compiled program.
      collate: function that converts examples to rows of the table.
      retrieve: function that retrieves passages, called again whenever training changes the searched
        vectors; None if nothing is retrieved. It receives the trained parts and, of an algorithm that
        changes frozen parts, these.
      index: {name: array}, the initial index. If given, the call is
        `retrieve(examples, trainable, index) -> (rows, index)`, each time with the index of the time
        before. None if `retrieve` keeps its own index fresh.
      cost: declared cost of a step, if any.
      idle: function that explains why a client would learn nothing; None if every example is useful.
      coupled: whether the loss of an example depends on the others of its batch, such as by in-batch
        negatives or a mean over the tokens of all.
      label: label in figures; the name if empty.
      spent: counter of the seconds of `retrieve`, if it has one.
      judged: metric for early stopping on held-out examples, higher is better; the loss if empty.
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
    coupled: bool = False
    label: str = ""
    spent: Spent | None = None
    judged: str = ""

    @property
    def declared(self) -> StepCost:
        """The declared cost of a step; an empty one if none is declared for this loss."""
        if self.cost is None or self.cost.loss != self.loss:
            return StepCost(self.loss)
        return self.cost

    def table(self, examples) -> dict[str, Any]:
        """Returns the collated examples before training."""
        return self.collate(examples, self.rows(examples, self.trainable))

    def rows(self, examples, trainable: PyTree, index: dict[str, Any] | None = None) -> Any:
        """Returns the retrieved corpus rows [N, k]; None if nothing is retrieved.

        Args:
          index: the index to retrieve with, of a task that has one; default: the initial one.
        """
        if self.retrieve is None:
            return None
        if not self.index:
            return self.retrieve(examples, trainable)
        rows, _ = self.retrieve(examples, trainable, index or self.index)
        return rows
