"""Detects the collapse of search policies early, ends the training, and restores the best parameters.

In public reproductions of Search-R1, rewards fall to zero within tens of steps, after the entropy has
vanished, every group has equal rewards, or no rollout is well-formed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.models import tensors
from fedrag_jax.objectives.task import PyTree

KEPT = "before_collapse.safetensors"


class CollapseSigns:
    """Decides from the records of a fit's rounds whether the policy has collapsed.

    Means are over the last `window` rounds. A policy has collapsed if one of these holds:

      reward: fallen by more than 1 - `fall` of the size of the best mean so far
      no_variance: at least `most_equal` of the groups have equal rewards, and the reward is below its
        best (groups with only correct answers are also equal, and are no problem)
      malformed: at least `most_malformed` of the rollouts are malformed, and more than at the best
      entropy: below `least_entropy` nats per token, and the reward is below its best

    Attributes:
      why: the sign that was seen; "" if none.

    Raises:
      ConfigError: a window below 1, a negative entropy, or a share outside (0, 1].
    """

    def __init__(
        self,
        *,
        window: int = 5,
        fall: float = 0.5,
        most_equal: float = 0.98,
        most_malformed: float = 0.9,
        least_entropy: float = 0.01,
    ):
        shares = {"fall": fall, "most_equal": most_equal, "most_malformed": most_malformed}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ConfigError(f"CollapseWatch: {name} must be in (0, 1], got {share}")
        if window < 1 or least_entropy < 0:
            raise ConfigError(
                "CollapseWatch: window must be at least 1 and least_entropy 0 or more, got "
                f"{window} and {least_entropy}"
            )
        self.window, self.shares, self.least_entropy = window, shares, least_entropy
        self.why = ""
        self._best: dict[str, float] = {}

    def look(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Checks the last records so far; returns whether the rewards are the best so far."""
        # Nobody may have answered a round.
        records = [record for record in history if record["loss"] is not None][-self.window :]
        if len(records) < self.window:
            return False
        names = "reward", "no_variance", "malformed", "entropy"
        if missing := [n for n in names if n not in records[-1]["metrics"]]:
            raise ConfigError(
                f"CollapseWatch: the task has no metric {missing[0]!r}; it watches tasks of search "
                "policies, such as `search_policy`"
            )

        now = {n: float(np.mean([record["metrics"][n] for record in records])) for n in names}
        if not self._best or now["reward"] > self._best["reward"]:
            self._best = now
            return True
        self.why = self._fault(now)
        return False

    def look_back(self, history: Sequence[Mapping[str, Any]]) -> int:
        """Checks the records of a whole fit, and forgets those of an earlier one; returns the round
        after which it had collapsed, or 0."""
        self.why, self._best = "", {}
        for end in range(1, len(history) + 1):
            self.look(history[:end])
            if self.why:
                return end
        return 0

    def _fault(self, now: dict[str, float]) -> str:
        best, shares = self._best, self.shares
        worse = now["reward"] < best["reward"]
        signs = {
            f"the reward fell from {best['reward']:.3f} to {now['reward']:.3f}": now["reward"]
            < best["reward"] - (1 - shares["fall"]) * abs(best["reward"]),
            f"{now['no_variance']:.0%} of the groups have equal rewards, below the best": worse
            and now["no_variance"] >= shares["most_equal"],
            f"{now['malformed']:.0%} of the rollouts are malformed": now["malformed"]
            >= shares["most_malformed"]
            and now["malformed"] > best["malformed"],
            f"the entropy is {now['entropy']:.4f} nats per token": worse
            and now["entropy"] < self.least_entropy,
        }
        return "; ".join(told for told, holds in signs.items() if holds)


class CollapseWatch(Callback):
    """Ends a fit whose policy collapses, gives the reason, and keeps the parameters with the best
    rewards.

    The rewards of a round belong to the parameters before it; these are the ones that are kept.

    Args:
      folder: folder of the kept parameters.
      settings: settings of `CollapseSigns`.

    Raises:
      ConfigError: as `CollapseSigns`; in a fit, an algorithm that leaves models with its clients or
        changes the base.
    """

    needs_whole_model = True

    def __init__(self, folder: str | pathlib.Path, **settings):
        self.signs, self.kept = CollapseSigns(**settings), pathlib.Path(folder) / KEPT
        self._before: PyTree = None

    @property
    def why(self) -> str:
        """The reason why the fit was ended; "" if it was not."""
        return self.signs.why

    @property
    def stopped(self) -> bool:
        return bool(self.why)

    def start(self, state):
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        if not state.round:
            self.kept.unlink(missing_ok=True)  # of another fit
        self._before = jax.device_get(state.state.trainable)
        self.signs.look_back(state.history)
        return state

    def round_end(self, state, record) -> bool:
        if self.signs.look(state.history):
            tensors.save_arrays(self._before, self.kept)
        self._before = jax.device_get(state.state.trainable)
        return self.stopped

    def trainable(self) -> PyTree:
        """The parameters with the best rewards.

        Raises:
          ConfigError: the fit was shorter than a window.
        """
        if not self.kept.exists():
            raise ConfigError(
                f"CollapseWatch: no parameters are kept in {self.kept.parent}, because the fit had "
                f"fewer rounds than the window of {self.signs.window}"
            )
        return tensors.load_arrays(self.kept)
