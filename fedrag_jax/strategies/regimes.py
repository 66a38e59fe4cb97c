"""Regimes: where the data is (pooled, with federated clients, or with lone clients), and budgets."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fedrag_jax.data.examples import Example
from fedrag_jax.data.partition import Partition, partition
from fedrag_jax.data.schemes import dirichlet
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm
from fedrag_jax.federated.algorithms import by_name
from fedrag_jax.federated.algorithms.centralised import centralised
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.engine.placement import mesh_under
from fedrag_jax.federated.optimizers import tunable
from fedrag_jax.federated.sampling import uniform
from fedrag_jax.objectives.task import Task

REGIMES = ("centralised", "federated", "local")
CONVERGED = "_converged"


class Regime(NamedTuple):
    """The settings in the name of a regime.

    Attributes:
      kind: one of `REGIMES`.
      alpha: Dirichlet concentration of the split over clients.
      converged: whether validation ends training, instead of the number of examples.
      algorithm: the federated algorithm in the name; "" if there is none.
    """

    kind: str
    alpha: float
    converged: bool = False
    algorithm: str = ""


def parse(regime: str, alpha: float) -> Regime:
    """Parses the name of a regime: `federated` has the given alpha, `federated_1` has 1;
    `federated_1_converged` trains until validation stops improving; `federated:fedprox` uses FedProx.

    Raises:
      ConfigError: an unknown regime, or an alpha that is not > 0; also as `with_algorithm`.
    """
    where, algorithm = with_algorithm(regime)
    kind, mark, own = where.removesuffix(CONVERGED).partition("_")
    try:
        alpha = float(own) if mark else alpha
    except ValueError:
        alpha = math.nan
    if kind not in REGIMES or (mark and kind == "centralised") or not alpha > 0:
        raise ConfigError(
            f"regime {regime!r} unknown; choose among {[*REGIMES]}, federated_<alpha> and "
            "local_<alpha> with an alpha > 0, such as federated_1 or federated_inf; each may end in "
            f"{CONVERGED}"
        )
    return Regime(kind, alpha, where.endswith(CONVERGED), algorithm or "")


class Stopping(NamedTuple):
    """The stopping rule of a training that ends when validation stops improving.

    Attributes:
      every: number of index refreshes (S·K steps each) between two evaluations.
      patience: training ends after this many evaluations in a row without a new best.
    """

    every: int = 2
    patience: int = 2


def with_algorithm(regime: str) -> tuple[str, str | None]:
    """Splits a name into regime and algorithm: "federated_1:fedadam" is federated_1 with fedadam.

    Raises:
      ConfigError: an unknown algorithm, or an algorithm for a regime that is not federated.
    """
    where, mark, algorithm = regime.partition(":")
    if not mark:
        return regime, None
    if not where.startswith("federated"):
        raise ConfigError(
            f"regime {regime!r} names an algorithm, and {where!r} averages nothing; only federated "
            "regimes take one, such as federated:fedprox"
        )
    by_name.check(algorithm, {}, f"regime {regime!r}")
    return where, algorithm


def rate_names(regime: str) -> list[str]:
    """Returns the names under which learning rates of a regime are looked up, its own name first.

    For "federated_1:fedadam" these are federated:fedadam, federated_1 and federated; for
    "local_1_converged" they are local_converged, local_1 and local.
    """
    where, mark, algorithm = regime.partition(":")
    kind = where.partition("_")[0]
    budget = CONVERGED if where.endswith(CONVERGED) else ""
    places = where, kind + budget, where.removesuffix(CONVERGED), kind
    names = [f"{place}{mark}{algorithm}" for place in places]
    return list(dict.fromkeys([*names, *places]))


class Budget(NamedTuple):
    """The training budget: every regime sees R·S·K·B examples, unless a client holds fewer than B.

    With `stopping` this is the maximum, and a lone client may see as many.

    Attributes:
      rounds: R, also the number of index refreshes.
      local_steps: S, steps per client and round. Centralised training runs rounds of S steps until it
        has taken K times as many steps, and refreshes after every K rounds.
      clients: K, the number of clients.
      batch_size: B, examples per step.
      group_size: clients trained side by side; None measures the fastest number.
      devices: number of devices that share the clients of federated training; 0 uses all.
      participation: share of the clients sampled in a federated round; the number of rounds and
        refreshes grows by the inverse of it.
      stopping: the rule for ending earlier; None for none.
    """

    rounds: int = 5
    local_steps: int = 5
    clients: int = 8
    batch_size: int = 8
    group_size: int | None = 1
    devices: int = 1
    participation: float = 1.0
    stopping: Stopping | None = None

    def schedule(self, regime: str) -> "Schedule":
        """Returns the rounds of a regime.

        Raises:
          ConfigError: participation times clients is not a whole number that divides the clients.
        """
        steps = self.local_steps
        if regime in ("centralised", "local") and self.stopping:
            # A round for each refresh: long trainings would spend much of their time between rounds.
            return Schedule(self.rounds, 1, 1, steps * self.clients)
        if regime == "centralised":
            return Schedule(self.rounds * self.clients, self.clients, 1, steps)
        if regime == "local":
            return Schedule(self.rounds, 1, 1, steps)
        asked = self.participation * self.clients
        drawn = round(asked)
        if drawn < 1 or self.clients % drawn or not math.isclose(drawn, asked):
            raise ConfigError(
                f"participation {self.participation:g} of {self.clients} clients is {asked:g}; it "
                "must be a whole number that divides them"
            )
        longer = self.clients // drawn
        return Schedule(self.rounds * longer, longer, drawn, steps)


class Schedule(NamedTuple):
    """The rounds in which a regime spends its budget.

    Attributes:
      rounds: number of rounds of `fit`.
      refresh_every: rounds between two index refreshes; all regimes have R refreshes.
      drawn: number of clients sampled per round.
      local_steps: steps per client and round.
    """

    rounds: int
    refresh_every: int
    drawn: int
    local_steps: int


def split_clients(
    examples: Sequence[Example],
    clients: int,
    alpha: float,
    column: str,
    seed: int,
    min_examples: int = 2,
) -> Partition:
    """Returns a Dirichlet(alpha) partition over a column, shared by federated and local training."""
    return partition(examples, dirichlet(alpha, clients, column, min_examples), seed=seed)


def arguments(
    task: Task,
    regime: str,
    examples: Sequence[Example],
    clients: Partition,
    budget: Budget,
    rates: dict[str, float],
    seed: int,
    callbacks=(),
    client: int | None = None,
    averaging: Callable[..., Algorithm] = fed_avg,
) -> dict[str, Any]:
    """Returns the arguments of `fit` for training a task in a regime.

    Args:
      clients: the partition for the federated and local regimes.
      rates: learning rate of each trained part (`adapters`, `query`, `document`) in the first round;
        it decays linearly towards zero over the rounds, as in Lawton et al. Algorithms with their own
        client optimizer use their own rate.
      client: the client that trains in the local regime.
      averaging: function from the options of `Work` to the algorithm of the federated regime.
    """
    if regime not in REGIMES:
        raise ConfigError(f"regime must be one of {REGIMES}, got {regime!r}")
    rounds, refresh_every, drawn, local_steps = budget.schedule(regime)
    work = {"local_steps": local_steps}
    if regime == "federated":
        data = clients
        if drawn < budget.clients:
            work["sampling"] = uniform(drawn)
    elif regime == "centralised":
        data = Partition(examples, (np.arange(len(examples)),))
    else:
        own = clients.of(client)
        data = Partition(own, (np.arange(len(own)),))
    alone = regime != "federated"
    algorithm = (centralised if alone else averaging)(**work)
    optimizer = None
    if algorithm.optimizer is None:

        def optimizer(round):
            return adamw({name: rates[name] * (1 - round / rounds) for name in task.trainable})

    # Of one height in all regimes, so that every client runs the program of centralised training.
    stretch = budget.local_steps * budget.clients * budget.batch_size
    seen = stretch if task.retrieve else stretch * budget.rounds
    return {
        "task": task,
        "data": data,
        "algorithm": algorithm,
        "rounds": rounds,
        "batch_size": budget.batch_size,
        "optimizer": optimizer,
        "group_size": budget.group_size,
        "seed": seed,
        "refresh_every": refresh_every,
        "table_rows": min(seen, len(examples)),
        "callbacks": callbacks,
        "mesh": None if alone else clients_mesh(budget.devices, mesh_under(task.frozen)),
        "time_aggregation": True,
    }


def clients_mesh(devices: int, under: Mesh | None = None) -> Mesh | None:
    """Returns a mesh with the axis "clients" over some devices, or over all (0); None for one device.

    Args:
      under: the mesh of the frozen part, if any; clients are then distributed over its axis "clients",
        if it has one.

    Raises:
      ConfigError: more devices than there are.
    """
    if under is not None:
        return under if "clients" in under.shape else None
    there = jax.devices()
    if not 0 <= devices <= len(there):
        raise ConfigError(
            f"federated.devices is {devices}, but JAX sees {len(there)}; 0 takes them all"
        )
    there = there[: devices or None]
    return Mesh(np.array(there), ("clients",)) if len(there) > 1 else None


def adamw(rates: dict[str, float]) -> optax.GradientTransformation:
    """AdamW with a learning rate for each part; the rates are inputs of the compiled program."""
    return tunable(_adamw_by_part, **rates)


def _adamw_by_part(**rates) -> optax.GradientTransformation:
    parts = {
        name: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
        for name, rate in rates.items()
    }
    return optax.partition(parts, lambda tree: {name: name for name in tree})
