"""The record of a round, and checks of its health."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedrag_jax.clock import Lap
from fedrag_jax.errors import DivergenceError
from fedrag_jax.federated.engine.cohort import Cohort
from fedrag_jax.federated.engine.round import Ran


class Spent(NamedTuple):
    """The time that a round took.

    Attributes:
      refreshing: searching for examples and collating them.
      choosing: a group size.
      sampling, reading: seconds of drawing clients and of what the round left.
      idle: seconds of the same round without local steps; None unless they are timed.
    """

    refreshing: Lap
    choosing: Lap
    sampling: float
    ran: Ran
    reading: float
    idle: float | None

    def record(self) -> dict[str, Any]:
        """As `fit` describes it."""
        ran, around = self.ran, self.sampling + self.reading
        seconds = around + ran.seconds
        return {
            "peak_bytes": ran.peak_bytes,
            "seconds": seconds,
            "device_seconds": seconds + (ran.devices - 1) * ran.seconds,
            "aggregate_seconds": 0.0 if self.idle is None else around + min(self.idle, ran.seconds),
            "refresh_seconds": sum(self.refreshing) - self.refreshing.compiling,
            "embed_seconds": self.refreshing.embedding,
            "retrieve_seconds": self.refreshing.searching,
            "compile_seconds": self.refreshing.compiling + sum(self.choosing) + ran.compile_seconds,
        }


def seen(history: Sequence[dict[str, Any]]) -> int:
    """Examples, in all rounds so far."""
    return history[-1]["examples"] if history else 0


def by_client(report: list[dict], parts: list[Cohort], total: int) -> tuple[np.ndarray, dict]:
    """(clients, report), in ascending order of clients, without padding."""
    clients = np.concatenate([part.clients.reshape(-1) for part in parts])
    flat = jax.tree.map(lambda *rows: np.concatenate([x.reshape(-1) for x in rows]), *report)
    order = np.argsort(clients, kind="stable")[: (clients < total).sum()]
    return clients[order], jax.tree.map(lambda x: x[order], flat)


def summary(clients: np.ndarray, report: dict) -> dict[str, Any]:
    """Means over the examples of a round, and each client's own; None where nobody took part, and of a
    client that is broken or dropped out."""
    seen = report["examples"].astype(np.float64)

    def mean(x):
        return float(np.sum(seen * x, where=seen > 0) / seen.sum()) if seen.sum() else None

    named = {name: report[name] for name in ("left_out", "dropped") if name in report}
    known = np.isfinite(report["loss"]) & ~report.get("dropped", np.zeros(len(clients), bool))
    return {
        "loss": mean(report["loss"]),
        "metrics": {name: mean(x) for name, x in report["metrics"].items()},
        "clients": clients.tolist(),
        "client_loss": [
            x if k else None for x, k in zip(report["loss"].tolist(), known, strict=True)
        ],
        **{name: clients[who].tolist() for name, who in named.items()},
    }


def require_finite(task: str, round: int, clients: np.ndarray, finite: np.ndarray, server: bool):
    """Refuses a round that left a number that is not finite.

    Raises:
      DivergenceError: names the task, the round and the clients.
    """
    if finite.all() and server:
        return
    who = ", ".join(map(str, clients[~finite])) if not finite.all() else "none (the server)"
    raise DivergenceError(
        f"task {task!r}, round {round}: loss or parameters are not finite; "
        f"client(s): {who}. Lower the learning rate or clip gradients; "
        "the last checkpoint precedes this round. fit(..., debug=True) names step and batch"
    )
