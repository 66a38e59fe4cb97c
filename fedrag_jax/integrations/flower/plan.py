"""The settings that all parties of a federation share."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, PyTree, State
from fedrag_jax.federated.compression.codec import Codec
from fedrag_jax.federated.engine.client import update_key
from fedrag_jax.federated.engine.start import initial_state, schedule
from fedrag_jax.federated.engine.two_sides import SharedRound, sent_shapes
from fedrag_jax.federated.optimizers import split
from fedrag_jax.integrations.flower.wire import named
from fedrag_jax.objectives.task import Task

PROTOCOL = 2  # version of the messages: parties with different versions refuse each other


@dataclasses.dataclass(frozen=True)
class Plan:
    """A federated fit, as its server and each of its parties define it; arguments are those of `fit`.

    The plans of all parties are equal except for the task: its passages and other frozen parts may
    differ between parties.

    Attributes:
      clients: maximum number N of parties, which are numbered from 0.

    Raises:
      ConfigError: the plan cannot be deployed: algorithms that leave a model with each client, have
        only one client, need all updates at once or exist only in simulation; simulated dropout and
        stragglers; tasks that keep an index between rounds; settings that `fit` refuses.
    """

    task: Task
    algorithm: Algorithm
    clients: int
    rounds: int = 10
    batch_size: int = 8
    optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None
    seed: int = 0
    refresh_every: int = 1

    def __post_init__(self):
        for name in ("clients", "rounds", "batch_size", "refresh_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Plan: {name} must be at least 1, got {getattr(self, name)}")
        name, work = self.algorithm.name, self.algorithm.work
        if self.algorithm.model is not None:
            raise ConfigError(
                f"{name} cannot be deployed: it leaves each client a model of its own, but the server "
                "sends one model to all; choose an algorithm that averages all trained parameters"
            )
        if why := self.algorithm.simulated:
            raise ConfigError(f"{name} cannot be deployed: {why}; choose another algorithm")
        self.algorithm.record_fields(self.rounds)  # refuses too many rounds
        if self.within.needs == "updates":
            raise ConfigError(
                f"{name} cannot be deployed: it needs all updates of a round at once, but the server "
                "adds them up as they arrive; choose an algorithm that needs only a sum"
            )
        for chance in ("dropout", "stragglers"):
            if getattr(work, chance):
                raise ConfigError(
                    f"{name} cannot be deployed: {chance}={getattr(work, chance)} simulates what real "
                    "parties do by themselves; remove it"
                )
        if self.task.index is not None or (self.task.retrieve and self.refresh_every > 1):
            raise ConfigError(
                f"task {self.task.name!r} cannot be deployed: its retrieval depends on earlier rounds, "
                "but a party that was not sampled has not seen their models; retrieve anew in every "
                "round (refresh_every=1, no index kept between rounds)"
            )
        for round in range(len(self.algorithm.turns)):
            sent_shapes(*self.shared_round(round), self.inner(self.initial), self.task.frozen, name)

    @property
    def within(self) -> Algorithm:
        """The algorithm inside the wrapper that encodes messages, if there is one."""
        return self.algorithm if self.algorithm.messages is None else self.algorithm.messages.inner

    @property
    def down(self) -> Codec | None:
        """The codec of the server's messages, or None."""
        return None if self.algorithm.messages is None else self.algorithm.messages.down

    def inner(self, state: State) -> State:
        """Returns the state of the algorithm inside the wrapper."""
        return state if self.down is None else state._replace(server=state.server["inner"])

    @functools.cached_property
    def optimizer_at(self) -> Callable[[int], optax.GradientTransformation]:
        """The function from a round, counted from 0, to the clients' optimizer."""
        return schedule(self.algorithm, self.optimizer)

    @functools.cached_property
    def initial(self) -> State:
        """The state before the first round, with the row of one client."""
        return initial_state(self.task, self.algorithm, self.optimizer_at(0), self.clients)

    @property
    def keeps_rows(self) -> bool:
        """Whether clients keep state between rounds."""
        return bool(jax.tree.leaves(self.initial.population))

    def shared_round(self, round: int) -> tuple[SharedRound, list]:
        """Returns the shared settings of a round, counted from 0, and the numbers of its optimizer."""
        return SharedRound.of(self.algorithm, self.optimizer_at(round), round)

    def key(self, round: int) -> jax.Array:
        """Returns the random key of a round, counted from 0."""
        return jax.random.fold_in(update_key(self.seed), np.int32(round))

    def handed_out(self, state: State) -> PyTree:
        """Returns the part of a state that the server sends."""
        server = {"server": self.inner(state).server} if self.algorithm.open_server else {}
        return {"trainable": state.trainable} | server

    def received(self, handed: PyTree) -> State:
        """Returns a client's state, from the arrays that the server sent."""
        return self.inner(self.initial)._replace(**handed)

    def sent(self, round: int) -> tuple[PyTree, PyTree]:
        """Returns shapes and types of a client's arrays in a round, from 0, and of their sums."""
        state = self.inner(self.initial)
        return sent_shapes(*self.shared_round(round), state, self.task.frozen, self.algorithm.name)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that must be equal at all parties, as JSON types."""
        arrays = named(self.handed_out(self.initial))
        _, numbers, _ = split(self.optimizer_at(0).init)  # `update` has the same
        return {
            "protocol": PROTOCOL,
            "task": self.task.name,
            "algorithm": self.algorithm.name,
            "clients": self.clients,
            "batch_size": self.batch_size,
            "optimizer": [np.asarray(x).tolist() for x in numbers],
            "seed": self.seed,
            "refresh_every": self.refresh_every,
            "arrays": {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()},
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, settings: Mapping[str, Any]) -> str:
        """Returns a description of how other settings differ from these; "" if they are equal."""
        mine = json.loads(json.dumps(self.settings))
        return "; ".join(
            f"{name} is {settings.get(name)!r} there and {mine.get(name)!r} here"
            for name in sorted({*settings, *mine})
            if settings.get(name) != mine.get(name)
        )
