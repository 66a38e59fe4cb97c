"""One round: asks the sampled parties and checks their answers."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flwr.app import ConfigRecord, Message, RecordDict

from fedrag_jax.errors import FedragError
from fedrag_jax.federated.algorithm import PyTree
from fedrag_jax.federated.callbacks import FitState
from fedrag_jax.integrations.flower.broadcast import hand_out
from fedrag_jax.integrations.flower.draws import Draws
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.roll import Asked, Mail, Roll
from fedrag_jax.integrations.flower.wire import add_sizes, from_record, named, sizes, to_record

log = logging.getLogger("flwr")
ATTEMPTS = 3  # of a round with too few answers


class RoundFailedError(FedragError):
    """Too few parties connected or answered, after all attempts."""


class Asking:
    """A round from the first message to the last answer.

    Attributes:
      drawn: numbers of the sampled parties.
      handed: the model and server state at the start of the round.
      answers: {client: report} of accepted answers; their arrays are files in the spool.
      refused: {client: reason} of the other sampled parties.
      up, down: bytes by part and type.
    """

    def __init__(
        self,
        plan: Plan,
        draws: Draws,
        mail: Mail,
        roll: Roll,
        now: FitState,
        spool: pathlib.Path,
    ):
        self.plan, self.mail, self.roll, self.now, self.spool = plan, mail, roll, now, spool
        self.numbers, held = roll.sizes()
        self.held = dict(zip(self.numbers.tolist(), held.tolist(), strict=True))
        self.drawn = self.numbers[draws.who(plan, held, now.round)].tolist()
        self.answers: dict[int, dict[str, Any]] = {}
        self.refused: dict[int, str] = {}
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.like, self.sums_like = plan.sent(now.round)
        self.handed = hand_out(plan, now.state, now.round)
        self._whole = to_record(self.handed.whole)
        self._message = None if self.handed.message is None else to_record(self.handed.message)
        self._nodes: dict[int, int] = {}
        self._open: set[int] = set()

    def until(self, quorum: int | None, patience: float) -> None:
        """Asks until `quorum` parties have answered; None for more than half of the sampled ones."""
        least = min(len(self.drawn) // 2 + 1 if quorum is None else quorum, len(self.drawn))
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1:  # parties that are gone may come back
                self.roll.look()
                self.roll.wait(lambda _: self._there() >= least)
            self._ask(patience, first=attempt == 1)
            self.mail.until(lambda: not self._open, patience, self._take)
            self.mail.forget("train")
            for client in self._open:
                self.refused[client] = f"no answer in {patience:g} s"
            if len(self.answers) >= least:
                return
            log.warning(
                f"round {self.now.round + 1}: {len(self.answers)} of {len(self.drawn)} parties "
                f"answered, but {least} must: attempt {attempt} of {ATTEMPTS}"
            )
        raise RoundFailedError(
            f"round {self.now.round + 1}: {len(self.answers)} of {len(self.drawn)} parties answered, "
            f"but {least} must ({self.refused}). Earlier rounds are saved: start again to continue"
        )

    def _there(self) -> int:
        """Returns the number of sampled parties that are connected."""
        return sum(client in self.roll.members for client in self.drawn)

    def _ask(self, patience: float, first: bool) -> None:
        last = counted(self.now.history)
        contents, models = {}, {}
        for client in self.drawn:
            member = self.roll.members.get(client)
            if client in self.answers:
                continue
            if member is None:
                self.refused[client] = "its node is gone"
                continue
            order = {"round": self.now.round + 1, "plan": self.plan.fingerprint}
            order["counted"] = last.get(client, 0)
            had = first and order["counted"] == self.now.round > 0  # the last message
            model = self._message if had and self._message is not None else self._whole
            order["whole"] = model is self._whole
            contents[member.node] = RecordDict({"model": model, "order": ConfigRecord(order)})
            models[member.node] = client, model
        sent = self.mail.send("train", contents, patience, str(self.now.round + 1))
        self._nodes = {node: models[node][0] for node in sent}
        for node, (client, model) in models.items():
            if node in sent:
                add_sizes(self.down, sizes(model))
            else:
                self.refused[client] = "its node cannot be reached"
        self._open = {*self._nodes.values()}

    def _take(self, asked: Asked, message: Message) -> None:
        if asked.kind != "train":
            self.roll.take(asked, message)
            return
        client = self._nodes[asked.node]
        self._open.discard(client)
        try:
            if message.has_error():
                raise ValueError(message.error.reason)
            report, arrays = self._checked(client, message.content)
        except Exception as error:  # nothing that a party sends ends the run
            self.refused[client] = str(error)
            log.warning("round %d, client %d: %s", self.now.round + 1, client, error)
            return
        with (self.spool / f"{client}.safetensors").open("wb") as file:
            file.write(safetensors.numpy.save({n: np.asarray(x) for n, x in arrays.items()}))
        self.refused.pop(client, None)
        self.answers[client] = report

    def _checked(self, client: int, content: RecordDict) -> tuple[dict, dict]:
        about: Any = content["about"]
        wanted = {"round": self.now.round + 1, "client": client, "plan": self.plan.fingerprint}
        for name, value in wanted.items():
            if about[name] != value:
                raise ValueError(f"the answer is of {name} {about[name]}, not {value}")
        arrays = from_record(content.array_records["model"], self.like, f"client {client}")
        report = {name: float(x) for name, x in content.metric_records["report"].items()}
        if not all(map(np.isfinite, (*report.values(), report["loss"]))) or report["examples"] < 0:
            raise ValueError(f"the report has numbers that are not finite: {report}")
        add_sizes(self.up, sizes(content.array_records["model"]))
        return report, named(arrays)

    def arrays(self, client: int) -> PyTree:
        """Returns the arrays that a client sent."""
        found = safetensors.numpy.load((self.spool / f"{client}.safetensors").read_bytes())
        leaves = [found[name] for name in named(self.like)]
        return jax.tree.unflatten(jax.tree.structure(self.like), leaves)


def counted(history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Returns the last round, from 1, in which each party's answer counted."""
    return {client: record["round"] for record in history for client in record["clients"]}
