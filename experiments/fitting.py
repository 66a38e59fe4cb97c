"""Trains one task with a lab's data and budget, and keeps nothing on disk.

Experiments that try many rates or rules use it; strategies are trained by `Lab.tuned_systems`, whose
results are read back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.curves import curve
from experiments.lab import Lab
from fedrag_jax.federated.algorithm import Algorithm
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.objectives.task import PyTree, Task
from fedrag_jax.strategies import regimes
from fedrag_jax.tracking.ledger import Cost, training_cost
from fedrag_jax.tracking.logs import Progress


class Fitted(NamedTuple):
    """What training returns.

    Attributes:
      trained: the trained parameters on the host: one pytree, or one for each client of a personal
        algorithm.
      frozen: the frozen parameters, which some algorithms change.
      points: the learning curve, a point for each index refresh of the budget; the last has `epochs`.
    """

    trained: list[PyTree]
    frozen: PyTree
    cost: Cost
    points: list[dict[str, Any]]


def fitted(
    lab: Lab,
    task: Task,
    regime: str,
    split: int,
    rates: Mapping[str, float],
    seed: int,
    what: str,
    *,
    averaging: Callable[..., Algorithm] = fed_avg,
    optimizer: Callable[[int], Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Fitted:
    """Trains a task on the lab's training questions.

    Args:
      split: seed of the partition.
      rates: learning rate of each trained part in the first round.
      what: description for the lines of progress.
      averaging: function from the options of `Work` to the algorithm of the federated regime.
      optimizer: function from the round to its optimizer; rates that decay linearly unless given.

    Raises:
      DivergenceError: training diverges.
    """
    budget, examples = lab.budget(), lab.dataset.train
    arguments = regimes.arguments(
        task, regime, examples, lab.clients(regime, split), budget, dict(rates), seed,
        callbacks=[Progress(what), *callbacks], averaging=averaging,
    )  # fmt: skip
    if optimizer is not None:
        arguments["optimizer"] = optimizer
    result, schedule = fit(**arguments), budget.schedule(regime)
    # Off the devices of the clients, each of which would do all of what follows.
    trained = jax.device_get(result.trainable)
    several = [trained]
    if arguments["algorithm"].model is not None:  # stacked, a model for each client
        several = [jax.tree.map(lambda x, i=i: x[i], trained) for i in range(budget.clients)]
    cost = training_cost(
        task,
        result.history,
        task.table(examples[:1]),
        steps=schedule.local_steps * sum(len(record["clients"]) for record in result.history),
        batch_size=budget.batch_size,
    )
    points = curve([result.history], schedule.refresh_every)
    points[-1]["epochs"] = points[-1]["examples"] / len(examples)
    return Fitted(several, result.frozen, cost, points)
