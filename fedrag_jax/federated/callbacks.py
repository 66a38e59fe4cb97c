"""Callbacks that `fit` calls between rounds."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from fedrag_jax.federated.algorithm import State


@dataclasses.dataclass(frozen=True)
class FitState:
    """The complete state of a training between two rounds.

    Attributes:
      round: number of finished rounds.
      state: arrays of the algorithm; the next round reuses their memory, so copy the arrays you keep.
      retrieved: int32 [N, k] rows last retrieved for the examples in use, or None.
      index: {name: NumPy array} of the searched index, if the task has one, or None.
      history: one record per finished round; see `fit`.
      settings: settings that must not change when a run is resumed, as JSON types. A value of None is
        not chosen yet, and is taken from the resumed run.
    """

    round: int
    state: State
    retrieved: np.ndarray | None
    history: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    index: Any = None


class Callback:
    """Base class whose methods do nothing; override the ones you need.

    Attributes:
      needs_whole_model: whether `state.state.trainable` has to be the whole trained model. Algorithms
        for which it is not, because models stay with the clients or the base changes, are then refused.
    """

    needs_whole_model = False

    def start(self, state: FitState) -> FitState:
        """Called before the first round; returns the starting state, which may be a restored one."""
        return state

    def round_end(self, state: FitState, record: dict[str, Any]) -> bool | None:
        """Called after every round with finite numbers; `record` is the last of `state.history`.

        Returns:
          True to end the fit with this round.
        """

    @property
    def stopped(self) -> bool:
        """Whether it has ended this fit, also before it was resumed: no further round is made."""
        return False

    def end(self) -> None:
        """Called once after the last round, also if the fit ends with an error."""


@contextlib.contextmanager
def ending(callbacks: Iterable[Callback]) -> Generator[None]:
    """Calls `end` of all callbacks when its block ends, also by an error."""
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            ends.callback(callback.end)
        yield
