"""A party of a federation: trains on its own examples when the server asks, and sends the result.

Only these leave it: arrays of trained parameters, its number, its number of examples, and means over
its examples of the loss and the metrics. Details of a failure stay in its own log, except for
differences between its settings and the server's.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedrag_jax
from fedrag_jax.data.partition import Partition
from fedrag_jax.errors import ConfigError, DivergenceError
from fedrag_jax.federated.algorithm import PyTree
from fedrag_jax.federated.engine.cohort import client_batches
from fedrag_jax.federated.engine.table import collate, warn_of_idle_clients
from fedrag_jax.federated.engine.two_sides import client_round, member_of
from fedrag_jax.integrations.flower.broadcast import begun, expected, nothing_heard
from fedrag_jax.integrations.flower.memory import Memory
from fedrag_jax.integrations.flower.model_file import save_model
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.wire import WireError, from_record, to_record

log = logging.getLogger("flwr")
NUMBER = "partition-id"  # the party's number, in the configuration of its node
FOLDER = "fedrag-folder"
FAILED = 1000  # code of our errors; Flower's codes are lower
Examples = Partition | Sequence[Any] | Callable[[Context], Sequence[Any]]


def client_app(
    plan: Plan | Callable[[Context], Plan],
    data: Examples,
    folder: str | pathlib.Path | None = None,
) -> ClientApp:
    """Returns the Flower ClientApp of a party.

        app = client_app(plan, my_examples)

    Args:
      plan: the plan, or a function that makes it from Flower's context.
      data: the party's examples, or a function that returns them; of a `Partition`, the party uses the
        part with its number.
      folder: folder of the party's state between rounds and of the final model, one per party.
        `fedrag-folder` in the node's configuration overrides it.

    The party's number, 0 to N - 1, is `partition-id` in the node's configuration:
    `flower-supernode --node-config 'partition-id=0'`.
    """
    app = ClientApp()

    def answering(work):
        def handler(message: Message, context: Context) -> Message:
            return answered(lambda: work(Party(plan, data, folder, context), message), message)

        return handler

    app.query("introduce")(answering(Party.introduce))
    app.train()(answering(Party.train))
    app.query("keep")(answering(Party.keep))
    return app


def answered(work: Callable[[], RecordDict], message: Message) -> Message:
    """Returns the reply to a message: the result of the work, or an error without details."""
    try:
        return Message(work(), reply_to=message)
    except (ConfigError, DivergenceError, WireError) as error:
        log.error("%s", error)
        told = "it diverged" if isinstance(error, DivergenceError) else str(error)
        return Message(Error(FAILED, told), reply_to=message)
    except Exception as error:
        log.exception("the work that the server asked for failed")
        told = f"{type(error).__name__}: the party's own log says more"
        return Message(Error(FAILED, told), reply_to=message)


class Party:
    """One party during one message."""

    def __init__(self, plan, data: Examples, folder, context: Context):
        self.plan: Plan = plan if isinstance(plan, Plan) else plan(context)
        number = context.node_config.get(NUMBER)
        if not isinstance(number, int) or not 0 <= number < self.plan.clients:
            raise ConfigError(
                f"{NUMBER} of the node's configuration must be the party's number, from 0 to "
                f"{self.plan.clients - 1}, got {number!r}: flower-supernode --node-config '{NUMBER}=0'"
            )
        self.number: int = number
        if isinstance(data, Partition):
            data = data.of(number)
        self.examples = data(context) if callable(data) else data
        folder = context.node_config.get(FOLDER, folder)
        self.folder = None if folder is None else pathlib.Path(str(folder))
        self.keeps = self.plan.keeps_rows or self.plan.down is not None
        if self.keeps and self.folder is None:
            raise ConfigError(
                f"{self.plan.algorithm.name}: a party keeps state between rounds; give it a folder, as "
                f"{FOLDER} in the node's configuration"
            )

    def introduce(self, message: Message) -> RecordDict:
        """Answers with the party's number, its number of examples and its settings."""
        about = ConfigRecord(
            {
                "client": self.number,
                "examples": len(self.examples),
                "settings": json.dumps(self.plan.settings),
                "version": fedrag_jax.__version__,
            }
        )
        return RecordDict({"about": about})

    def train(self, message: Message) -> RecordDict:
        """Trains for one round."""
        plan, order = self.plan, message.content["order"]
        whole = bool(order["whole"])
        round, handed = self._asked(message, expected(plan, whole))
        first = {"row": plan.initial.population}
        if plan.down is not None:
            first["heard"] = nothing_heard(plan)
        memory = Memory(self.folder, plan, first) if self.keeps else None
        counted = int(order["counted"]) if plan.keeps_rows or not whole else 0
        kept = first if memory is None else memory.row(counted)
        state, heard = begun(plan, round, handed, None if whole else kept["heard"])
        state = state._replace(population=kept["row"])
        table = self._table(state.trainable)
        rows = np.arange(len(self.examples))
        settings = plan.algorithm.work, round, plan.batch_size, plan.seed
        batches = client_batches(rows, self.number, *settings)
        member = member_of(self.number, 1.0, batches)
        shared, numbers = plan.shared_round(round)
        frozen = jax.tree.map(jax.numpy.asarray, plan.task.frozen)
        about = numbers, state, frozen, table, member, plan.key(round)
        sent, row, report = jax.device_get(client_round(shared, plan.task.loss, *about))
        if not report["finite"]:
            raise DivergenceError(
                f"task {plan.task.name!r}, round {round + 1}: loss or parameters of client "
                f"{self.number} are not finite; lower the learning rate or clip gradients"
            )
        if memory is not None:
            after = {"row": row, "heard": heard}
            memory.keep(round + 1, {name: after[name] for name in first})
        told = {name: float(x) for name, x in report["metrics"].items()}
        told |= {"loss": float(report["loss"]), "examples": float(report["examples"])}
        about = {"client": self.number, "round": round + 1, "plan": plan.fingerprint}
        return RecordDict(
            {"model": to_record(sent), "about": ConfigRecord(about), "report": MetricRecord(told)}
        )

    def keep(self, message: Message) -> RecordDict:
        """Saves the final model, if there is a folder."""
        round, handed = self._asked(message, self.plan.handed_out(self.plan.initial))
        if self.folder is not None:
            save_model(self.plan, handed, self.folder)
        return RecordDict({"about": ConfigRecord({"client": self.number, "round": round + 1})})

    def _asked(self, message: Message, like: PyTree) -> tuple[int, PyTree]:
        """Returns the round of a message, counted from 0, and its arrays, checked against `like`."""
        order = message.content["order"]
        if order["plan"] != self.plan.fingerprint:
            raise ConfigError(
                f"the server has plan {order['plan']}, but client {self.number} has plan "
                f"{self.plan.fingerprint}: start both with the same settings"
            )
        handed = from_record(message.content["model"], like, "the server")
        return int(order["round"]) - 1, handed

    def _table(self, trainable) -> dict[str, Any]:
        task, examples = self.plan.task, self.examples
        alone = Partition(examples, (np.arange(len(examples)),))
        warn_of_idle_clients(task, alone, self.plan.batch_size)
        rows = np.arange(len(examples))
        found = None if task.retrieve is None else np.asarray(task.retrieve(examples, trainable))
        return jax.tree.map(jax.numpy.asarray, collate(task, examples, rows, found))
