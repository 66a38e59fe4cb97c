"""What one training step minimises."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PyTree = Any


class StepCost(NamedTuple):
    """What a training step takes, as the objective declares it; what is None is empty in every table.

    Attributes:
      loss: that it is about: a task that is given another loss has to declare another cost.
      flops: `flops(task, table) -> float`, operations of one example in a step by the formulas of its
        networks, from the shapes of a table, of which any rows are given.
      compiler_flops: `compiler_flops(task, table, batch_size) -> float`, the compiler's own count.
      tokens: the metric of the loss that says how many tokens its networks read of an example, without
        padding.
    """

    loss: Callable[..., Any]
    flops: Callable[["Task", Mapping[str, Any]], float] | None = None
    compiler_flops: Callable[["Task", Mapping[str, Any], int], float] | None = None
    tokens: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A loss, the arrays it is about, and the way examples become its batches.

    Attributes:
      name: for logs and file names.
      trainable: pytree that the optimizer moves.
      frozen: pytree shared by all clients; no gradient is taken for it.
      loss: pure `loss(trainable, frozen, batch, rng) -> (scalar, {name: scalar})`. `batch` holds rows
        of the table, leading axis B, and `weight` float [B] (0 marks padding); the loss is the
        weighted mean over examples. Tasks built from the same networks and settings carry an equal
        `loss`, so that one compiled program serves them all.
      collate: `collate(examples, retrieved) -> {name: np.ndarray [N, ...]}`; row i is examples[i];
        the same shapes at every call.
      retrieve: `retrieve(examples, trainable) -> int32 [N, k]` rows of the knowledge store, asked
        again whenever what is trained moves the vectors searched; None if nothing is retrieved.
      index: {name: array}, what is searched at first; then it is
        `retrieve(examples, trainable, index) -> (rows, index)`, each time with the index that the time
        before left. None where `retrieve` sees to it that its index is fresh.
      cost: what a step of this loss takes, where somebody declares it.
      label: what figures call it; the name if empty.
      idle: `idle(examples, batch_size) -> str`, why a client learns nothing from its examples; "" where
        it learns. A ConfigError where nobody could. None where any example teaches something.
    """

    name: str
    trainable: PyTree
    frozen: PyTree
    loss: Callable[[PyTree, PyTree, dict, Any], tuple[Any, dict]]
    collate: Callable[[Any, Any], dict]
    retrieve: Callable[..., Any] | None = None
    index: dict[str, Any] | None = None
    cost: StepCost | None = None
    idle: Callable[[Any, int], str] | None = None
    label: str = ""

    @property
    def declared(self) -> StepCost:
        """The cost of a step; one that says nothing where it is declared for no loss or for another."""
        stands = self.cost is not None and self.cost.loss == self.loss
        return self.cost if stands else StepCost(self.loss)

    def table(self, examples) -> dict[str, Any]:
        """What `collate` makes of examples before anything is trained."""
        found = None
        if self.retrieve is not None:
            found = self.retrieve(examples, self.trainable, *([self.index] if self.index else []))
        return self.collate(examples, found[0] if self.index else found)
