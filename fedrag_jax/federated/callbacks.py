"""What `fit` tells the world between rounds."""

import dataclasses
from typing import Any

import numpy as np

from fedrag_jax.federated.algorithm import State


@dataclasses.dataclass(frozen=True)
class FitState:
    """All that training needs to go on from here.

    Attributes:
      round: rounds done.
      state: arrays of the algorithm; the next round reuses their memory, so copy what you keep.
      retrieved: int32 [N, k] rows last retrieved for the examples in use, or None.
      index: {name: NumPy array} of what they were retrieved from, if the task has an index, or None.
      history: one record per round done; see `fit`.
      settings: what must not change when a run is resumed; JSON types. None is still to be chosen,
        and is what the resumed run had.
    """

    round: int
    state: State
    retrieved: np.ndarray | None
    history: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    index: Any = None


class Callback:
    """Does nothing; override what you need."""

    def start(self, state: FitState) -> FitState:
        """Before the first round; returns where to start, which may be a restored state."""
        return state

    def round_end(self, state: FitState, record: dict[str, Any]) -> bool | None:
        """After every round whose numbers are finite; `record` is the last of `state.history`.

        Returns:
          True to end the fit with this round.
        """
