"""The state that a party keeps between rounds, such as its control variate."""

import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.federated.algorithm import PyTree
from fedrag_jax.files import whole
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.wire import named

NAME = "memory.safetensors"


class Memory:
    """One client's state (its row) before and after its last round, in a file.

    Only the server knows whether that round counted: the answer may be lost, or the server may resume
    from an earlier round. So both rows are kept, and the server's next message names the party's last
    counted round.

    Args:
      folder: folder of the party.
      first: the row before the first round.

    Raises:
      ConfigError: the file belongs to another plan.
      DataError: the file cannot be read.
    """

    def __init__(self, folder: pathlib.Path, plan: Plan, first: PyTree):
        self.path, self.plan = folder / NAME, plan
        self.row_like = first
        # (round that counted last, row) before the last work and after it
        self.before: tuple[int, PyTree] = (0, jax.device_get(self.row_like))
        self.after = self.before
        if self.path.exists():
            self._read()

    def row(self, counted: int) -> PyTree:
        """Returns the row after the last counted round, counted from 1; 0 if no round has counted.

        Raises:
          ConfigError: the file has no such row.
        """
        if counted == 0:
            self.before = self.after = 0, jax.device_get(self.row_like)
        elif counted == self.after[0]:
            self.before = self.after
        elif counted == self.before[0]:
            self.after = self.before
        else:
            raise ConfigError(
                f"the server counted round {counted} of this party last, but {self.path} has rounds "
                f"{self.before[0]} and {self.after[0]}: use the folder that the party had in round "
                f"{counted}, or start the federation from the beginning"
            )
        return self.before[1]

    def keep(self, round: int, row: PyTree) -> None:
        """Saves the row after a round, counted from 1, beside the row that `row` returned."""
        self.after = round, row
        arrays = {
            f"{when}.{name}": np.asarray(x, order="C")
            for when, (_, tree) in (("before", self.before), ("after", self.after))
            for name, x in named(tree).items()
        }
        about = {"plan": self.plan.fingerprint}
        about |= {"before": str(self.before[0]), "after": str(self.after[0])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path, "wb") as file:
            file.write(safetensors.numpy.save(arrays, about))

    def _read(self) -> None:
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                about: dict[str, Any] = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("plan") != self.plan.fingerprint:
                raise ConfigError(
                    f"{self.path} belongs to plan {about.get('plan')}, but this plan is "
                    f"{self.plan.fingerprint}: use a separate folder for each federation"
                )
            self.before = int(about["before"]), self._tree("before", arrays)
            self.after = int(about["after"]), self._tree("after", arrays)
        except (OSError, safetensors.SafetensorError, LookupError) as error:
            raise DataError(f"{self.path} cannot be read ({error})") from error

    def _tree(self, when: str, arrays: dict[str, np.ndarray]) -> PyTree:
        leaves = [arrays[f"{when}.{name}"] for name in named(self.row_like)]
        return jax.tree.unflatten(jax.tree.structure(self.row_like), leaves)
