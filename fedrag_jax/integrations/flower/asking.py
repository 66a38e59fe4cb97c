"""One round: who is asked, and what they answer."""

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
from fedrag_jax.integrations.flower.wire import from_record, named, sizes, to_record

log = logging.getLogger("flwr")
ATTEMPTS = 3  # of a round that too few have answered


class RoundFailedError(FedragError):
    """Too few parties came or answered, however often they were asked."""


class Asking:
    """A round from the first message to the last answer.

    Attributes:
      drawn: numbers of the parties that are asked.
      handed: what the round begins with.
      answers: {client: its report} of those whose answers count; their arrays are in the spool.
      refused: {client: why} of the others who answered.
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
        """Asks until enough have answered: so many, or more than half of those drawn."""
        least = min(len(self.drawn) // 2 + 1 if quorum is None else quorum, len(self.drawn))
        for attempt in range(1, ATTEMPTS + 1):
            if attempt > 1:  # those who are gone may come back
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
                f"round {self.now.round + 1}: {len(self.answers)} of {len(self.drawn)} have answered, "
                f"and {least} must: attempt {attempt} of {ATTEMPTS}"
            )
        raise RoundFailedError(
            f"round {self.now.round + 1}: {len(self.answers)} of {len(self.drawn)} parties answered, "
            f"and {least} must ({self.refused}). Rounds before are kept: start again to go on"
        )

    def _there(self) -> int:
        """How many of those drawn are there."""
        return sum(client in self.roll.members for client in self.drawn)

    def _ask(self, patience: float, first: bool) -> None:
        last = counted(self.now.history)
        self._nodes = {}
        for client in self.drawn:
            member = self.roll.members.get(client)
            if client in self.answers:
                continue
            if member is None:
                self.refused[client] = "its node is gone"
                continue
            order = {"round": self.now.round + 1, "plan": self.plan.fingerprint}
            order["counted"] = last.get(client, 0)
            had = first and order["counted"] == self.now.round > 0  # what was said before
            model = self._message if had and self._message is not None else self._whole
            order["whole"] = model is self._whole
            content = RecordDict({"model": model, "order": ConfigRecord(order)})
            group = str(self.now.round + 1)
            if self.mail.send("train", member.node, content, patience, group):
                self._nodes[member.node] = client
                _add(self.down, sizes(model))
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
        except (ValueError, LookupError, TypeError) as error:
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
                raise ValueError(f"its answer is of {name} {about[name]}, not {value}")
        arrays = from_record(content.array_records["model"], self.like, f"client {client}")
        report = {name: float(x) for name, x in content.metric_records["report"].items()}
        if not all(map(np.isfinite, (*report.values(), report["loss"]))) or report["examples"] < 0:
            raise ValueError(f"its report is not of finite numbers: {report}")
        _add(self.up, sizes(content.array_records["model"]))
        return report, named(arrays)

    def arrays(self, client: int) -> PyTree:
        """What a client has sent."""
        found = safetensors.numpy.load((self.spool / f"{client}.safetensors").read_bytes())
        leaves = [found[name] for name in named(self.like)]
        return jax.tree.unflatten(jax.tree.structure(self.like), leaves)


def counted(history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Of each party the last round, from 1, for which its answer counted."""
    return {client: record["round"] for record in history for client in record["clients"]}


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for kind, size in more.items():
        total[kind] = total.get(kind, 0) + size
