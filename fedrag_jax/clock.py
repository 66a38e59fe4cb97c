"""Elapsed seconds, split by activity."""

import collections
import dataclasses
import threading
import time
from typing import NamedTuple

import jax


class Lap(NamedTuple):
    """Seconds of one time span, by activity.

    Attributes:
      others: seconds of all other activities.
      compiling: seconds of JAX compilation.
      embedding: seconds of embedding passages; for vectors read from disk, their original time.
      searching: seconds of searching for passages, embedding questions and building indexes.
    """

    others: float
    compiling: float = 0.0
    embedding: float = 0.0
    searching: float = 0.0


@dataclasses.dataclass
class Spent:
    """Seconds so far, as in `Lap`; the code that spends them adds them here."""

    embedding: float = 0.0
    searching: float = 0.0


class Clock:
    """Measures the seconds between laps, by activity.

    Args:
      spent: the counters of embedding and searching; without them, both count as others.
    """

    def __init__(self, spent: Spent | None = None):
        self.spent = spent or Spent()
        self.last, self.known = time.perf_counter(), self._now()

    def _now(self) -> dict[str, float]:
        return {"compiling": _compiling[0]} | vars(self.spent)

    def lap(self) -> Lap:
        """Returns the time since the last lap."""
        last, known = self.last, self.known
        self.last, self.known = time.perf_counter(), self._now()
        took = self.last - last
        parts = {name: self.known[name] - known[name] for name in known}
        parts["compiling"] = min(took, parts["compiling"])  # threads may compile side by side
        return Lap(max(took - sum(parts.values()), 0.0), **parts)


# JAX tells its listeners, and has no other way to say how long it compiles.
_compiling = [0.0]
_stretches: collections.deque = collections.deque(maxlen=1000)  # (start, end), none overlapping
_lock = threading.Lock()


def _hear(event: str, seconds: float, **_) -> None:
    """Counts the time that passes while anything compiles: once where functions are traced within
    others or threads compile side by side."""
    if not event.startswith("/jax/core/compile/"):
        return
    with _lock:
        end = time.perf_counter()
        start, counted = end - seconds, 0.0
        while _stretches and _stretches[-1][1] > start:
            first, last = _stretches.pop()
            start, counted = min(start, first), counted + last - first
        _stretches.append((start, end))
        _compiling[0] += end - start - counted


jax.monitoring.register_event_duration_secs_listener(_hear)
