"""Seconds, by what they were spent on."""

import collections
import threading
import time
from typing import NamedTuple

import jax


class Lap(NamedTuple):
    """Seconds of a stretch of time.

    Attributes:
      others: spent on none of these.
      compiling: by JAX.
      embedding: of passages; where their vectors lay on disk, as long as it took then.
      searching: for passages, questions embedded included.
    """

    others: float
    compiling: float = 0.0
    embedding: float = 0.0
    searching: float = 0.0


class Clock:
    """Seconds between laps, by what they were spent on."""

    def __init__(self):
        self.last, self.heard = time.perf_counter(), dict(_heard)

    def lap(self) -> Lap:
        """What has passed since the last lap."""
        last, heard = self.last, self.heard
        self.last, self.heard = time.perf_counter(), dict(_heard)
        took = self.last - last
        spent = {name: self.heard[name] - heard[name] for name in heard}
        spent["compiling"] = min(took, spent["compiling"])  # threads may compile side by side
        return Lap(max(took - sum(spent.values()), 0.0), **spent)


def tell(part: str, seconds: float) -> None:
    """Has all clocks know that so many seconds went into one of the parts of a `Lap`."""
    _heard[part] += seconds


_heard = {"compiling": 0.0, "embedding": 0.0, "searching": 0.0}


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
        tell("compiling", end - start - counted)


jax.monitoring.register_event_duration_secs_listener(_hear)
