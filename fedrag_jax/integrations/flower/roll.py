"""Who takes part: nodes that have come, the parties that they are, and messages on their way."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedrag_jax.integrations.flower.plan import Plan

log = logging.getLogger("flwr")
AT_ONCE = 8  # replies fetched in one go: so many models are in memory besides the server's own
SHORTEST, LONGEST = 0.05, 1.0  # seconds between two looks for replies
AGAIN = 60.0  # seconds after which a node that failed to say who it is is asked again


class Member(NamedTuple):
    """A party that has introduced itself: its node, and how many examples it holds."""

    node: int
    examples: int


class Asked(NamedTuple):
    """A message that waits for its reply."""

    node: int
    kind: str


class Mail:
    """Messages to nodes, and their replies as they come."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.waiting: dict[str, Asked] = {}

    def send(self, kind: str, node: int, content: RecordDict, patience: float, group: str = ""):
        """Sends one message; whether it could be sent."""
        message = Message(content, node, kind, ttl=patience, group_id=group)
        (found,) = [*self.grid.push_messages([message])] or [None]
        if found:
            self.waiting[str(found)] = Asked(node, kind)
        return bool(found)

    def replies(self) -> Iterator[tuple[Asked, Message]]:
        """Those that have come: an error where a node failed or is gone."""
        ids = [*self.waiting]
        for start in range(0, len(ids), AT_ONCE):
            for message in self.grid.pull_messages(ids[start : start + AT_ONCE]):
                asked = self.waiting.pop(message.metadata.reply_to_message_id, None)
                if asked is not None:
                    yield asked, message

    def until(self, done: Callable[[], bool], patience: float, take: Callable) -> bool:
        """Hands replies to `take` until `done()` or until patience, in seconds, is at its end."""
        end, pause = time.monotonic() + patience, SHORTEST
        while not done():
            came = False
            for asked, message in self.replies():
                take(asked, message)
                came = True
            if done() or time.monotonic() >= end:
                break
            pause = SHORTEST if came else min(2 * pause, LONGEST)
            time.sleep(min(pause, max(end - time.monotonic(), 0)))
        return done()

    def forget(self, kind: str) -> None:
        """Waits no longer for replies to messages of a kind."""
        self.waiting = {i: asked for i, asked in self.waiting.items() if asked.kind != kind}


class Roll:
    """The parties that are there, by number.

    A node that comes is asked who it is, and counts once it has told a number that nobody else has and
    the settings of the plan. A node that is gone is left out until it comes back.
    """

    def __init__(self, plan: Plan, mail: Mail, patience: float):
        self.plan, self.mail, self.patience = plan, mail, patience
        self.members: dict[int, Member] = {}
        self._known: set[int] = set()  # nodes that were asked, or refused
        self._not_before: dict[int, float] = {}

    def look(self) -> None:
        """Asks nodes that have come who they are, and leaves out those that are gone."""
        there = {*map(int, self.mail.grid.get_node_ids())}
        for number, member in [*self.members.items()]:
            if member.node not in there:
                log.warning("client %d (node %d) is gone", number, member.node)
                del self.members[number]
        self._known &= there
        now = time.monotonic()
        for node in (n for n in there - self._known if self._not_before.get(n, now) <= now):
            about = RecordDict({"order": ConfigRecord({"plan": self.plan.fingerprint})})
            if self.mail.send("query.introduce", node, about, self.patience):
                self._known.add(node)

    def wait(self, enough: Callable[[int], bool]) -> bool:
        """Waits until enough parties are there, by their number; False if patience ended first."""
        looked = time.monotonic()

        def done() -> bool:
            nonlocal looked
            if time.monotonic() - looked > LONGEST:
                self.look()
                looked = time.monotonic()
            return enough(len(self.members))

        return self.mail.until(done, self.patience, self.take)

    def take(self, asked: Asked, message: Message) -> None:
        """A reply to the question who a node is."""
        if asked.kind != "query.introduce":
            return
        try:
            number, member = self._introduced(asked.node, message)
        except (ValueError, LookupError, TypeError) as error:
            log.warning("node %d is refused: %s", asked.node, error)
            return
        log.info("client %d is node %d, %d examples", number, member.node, member.examples)
        self.members[number] = member

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of those who are there, ascending, and how many examples each holds."""
        numbers = np.array(sorted(self.members), np.int32)
        return numbers, np.array([self.members[int(n)].examples for n in numbers], np.int64)

    def _introduced(self, node: int, message: Message) -> tuple[int, Member]:
        if message.has_error():
            self._known.discard(node)  # it may do better later; every message is a process there
            self._not_before[node] = time.monotonic() + AGAIN
            raise ValueError(message.error.reason)
        about: Any = message.content["about"]
        settings = json.loads(str(about["settings"]))
        if different := self.plan.differences(settings):
            raise ValueError(f"its settings are not the server's: {different}")
        number, examples = about["client"], about["examples"]
        if not isinstance(number, int) or not 0 <= number < self.plan.clients:
            raise ValueError(
                f"its number must be from 0 to {self.plan.clients - 1}, got {number!r}"
            )
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"it must hold at least one example, got {examples!r}")
        holder = self.members.get(number)
        if holder is not None and holder.node != node:
            raise ValueError(f"it is number {number}, and so is node {holder.node}")
        return number, Member(node, examples)
