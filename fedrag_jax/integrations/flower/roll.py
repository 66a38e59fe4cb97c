"""The connected nodes, the parties that they are, and the messages that wait for replies."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedrag_jax.integrations.flower.plan import Plan

log = logging.getLogger("flwr")
AT_ONCE = 8  # messages in a request: as many models are in memory besides the server's own
SHORTEST, LONGEST = 0.05, 1.0  # seconds between two checks for replies
AGAIN = 60.0  # seconds until a node that failed to introduce itself is asked again


class Member(NamedTuple):
    """A party that has introduced itself: its node and its number of examples."""

    node: int
    examples: int


class Asked(NamedTuple):
    """A sent message without a reply."""

    node: int
    kind: str


class Mail:
    """Sends messages to nodes and fetches replies as they arrive."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.waiting: dict[str, Asked] = {}

    def send(
        self, kind: str, contents: Mapping[int, RecordDict], patience: float, group: str = ""
    ) -> set[int]:
        """Sends a message to each of some nodes; returns the nodes that it was sent to.

        Some go out together, because Flower then sends arrays that they share only once. All together
        would lock the SuperLink's database for longer than its other users wait.
        """
        nodes, sent = [*contents], set()
        for some in (nodes[i : i + AT_ONCE] for i in range(0, len(nodes), AT_ONCE)):
            messages = [
                Message(contents[node], node, kind, ttl=patience, group_id=group) for node in some
            ]
            numbers = [*self.grid.push_messages(messages)]
            there = {node: str(n) for node, n in zip(some, numbers, strict=False) if n}
            self.waiting |= {number: Asked(node, kind) for node, number in there.items()}
            sent |= {*there}
        return sent

    def replies(self) -> Iterator[tuple[Asked, Message]]:
        """Yields the replies that have arrived; an error if a node failed or is gone."""
        ids = [*self.waiting]
        for start in range(0, len(ids), AT_ONCE):
            for message in self.grid.pull_messages(ids[start : start + AT_ONCE]):
                asked = self.waiting.pop(message.metadata.reply_to_message_id, None)
                if asked is not None:
                    yield asked, message

    def until(self, done: Callable[[], bool], patience: float, take: Callable) -> bool:
        """Passes replies to `take` until `done()`, for at most `patience` seconds; returns `done()`."""
        end, pause = time.monotonic() + patience, SHORTEST
        while not done():
            came, began = False, time.monotonic()
            for asked, message in self.replies():
                take(asked, message)
                came = True
            asking = time.monotonic() - began  # a busy SuperLink is left alone as long
            if done() or time.monotonic() >= end:
                break
            pause = SHORTEST if came else min(2 * pause, LONGEST)
            time.sleep(min(max(pause, asking), max(end - time.monotonic(), 0)))
        return done()

    def forget(self, kind: str) -> None:
        """Stops waiting for replies to messages of a kind."""
        self.waiting = {i: asked for i, asked in self.waiting.items() if asked.kind != kind}


class Roll:
    """The connected parties, by number.

    A new node is asked to introduce itself. It becomes a member if its number is unique and its
    settings are those of the plan. A node that disconnects is no member until it returns, and a node
    that was refused its number is asked again.
    """

    def __init__(self, plan: Plan, mail: Mail, patience: float):
        self.plan, self.mail, self.patience = plan, mail, patience
        self.members: dict[int, Member] = {}
        self._known: set[int] = set()  # nodes that were asked, or refused
        self._not_before: dict[int, float] = {}
        self._seconds: dict[int, set[int]] = {}  # by number: nodes refused because a member has it

    def look(self) -> None:
        """Asks new nodes to introduce themselves, and removes disconnected ones."""
        there = {*map(int, self.mail.grid.get_node_ids())}
        for number, member in [*self.members.items()]:
            if member.node not in there:
                log.warning("client %d (node %d) is gone", number, member.node)
                del self.members[number]
                self._known -= self._seconds.pop(number, set())  # one may be its new connection
        self._known &= there
        now = time.monotonic()
        new = (n for n in there - self._known if self._not_before.get(n, now) <= now)
        about = RecordDict({"order": ConfigRecord({"plan": self.plan.fingerprint})})
        self._known |= self.mail.send("query.introduce", dict.fromkeys(new, about), self.patience)

    def wait(self, enough: Callable[[int], bool]) -> bool:
        """Waits until `enough(number of members)`; returns False if patience ends first."""
        looked = time.monotonic()

        def done() -> bool:
            nonlocal looked
            if time.monotonic() - looked > LONGEST:
                self.look()
                looked = time.monotonic()
            return enough(len(self.members))

        return self.mail.until(done, self.patience, self.take)

    def take(self, asked: Asked, message: Message) -> None:
        """Handles a node's introduction; ignores other replies."""
        if asked.kind != "query.introduce":
            return
        try:
            number, member = self._introduced(asked.node, message)
        except Exception as error:  # nothing that a party sends ends the run
            log.warning("node %d is refused: %s", asked.node, error)
            return
        log.info("client %d is node %d, %d examples", number, member.node, member.examples)
        self.members[number] = member

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the members' numbers, ascending, and their numbers of examples."""
        numbers = np.array(sorted(self.members), np.int32)
        return numbers, np.array([self.members[int(n)].examples for n in numbers], np.int64)

    def _introduced(self, node: int, message: Message) -> tuple[int, Member]:
        if message.has_error():
            self._known.discard(node)  # it may succeed later; every message is a process there
            self._not_before[node] = time.monotonic() + AGAIN
            raise ValueError(message.error.reason)
        about: Any = message.content["about"]
        settings = json.loads(str(about["settings"]))
        if different := self.plan.differences(settings):
            raise ValueError(f"its settings differ from the server's: {different}")
        number, examples = about["client"], about["examples"]
        if not isinstance(number, int) or not 0 <= number < self.plan.clients:
            raise ValueError(
                f"its number must be from 0 to {self.plan.clients - 1}, got {number!r}"
            )
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"it must have at least one example, got {examples!r}")
        holder = self.members.get(number)
        if holder is not None and holder.node != node:
            self._seconds.setdefault(number, set()).add(node)
            raise ValueError(f"its number is {number}, which node {holder.node} has already")
        return number, Member(node, examples)
