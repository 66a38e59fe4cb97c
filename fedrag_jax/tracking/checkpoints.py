"""Checkpoints of a fit, saved round by round, for resuming."""

import logging
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedrag_jax import files
from fedrag_jax.errors import ConfigError, FedragError
from fedrag_jax.federated.callbacks import Callback, FitState


class Checkpointer(Callback):
    """Saves a fit with Orbax, and resumes it when the same fit starts again.

    A round counts only when it has been written completely, so a killed process leaves the last
    finished round. A checkpoint contains every array of the state, the retrieved rows and their index,
    the history and the settings of the fit. On the same kind of device and with the same versions, a
    resumed `fit` ends bit-identical to an uninterrupted one. A `sweep` decides by time whether fits run
    side by side, which changes the last bits of sums.

    If a checkpoint cannot be read, it is reported and renamed, and the previous one is used.

    Raises, from `fit`:
      ConfigError: a checkpoint cannot be written; the one before stays.

    Args:
      directory: directory of this one fit; created if absent. Several processes must share it.
      every: rounds between two checkpoints; the last of all rounds is saved, too. A fit that ends early
        repeats the rounds since its newest checkpoint when it is called again.
      keep: number of newest checkpoints to keep.
    """

    def __init__(self, directory: str | os.PathLike, every: int = 1, keep: int = 2):
        if every < 1 or keep < 1:
            raise ConfigError(
                f"Checkpointer: every and keep must be at least 1, got {every} and {keep}"
            )
        logging.getLogger("absl").addFilter(_not_raised)
        self.directory, self.every, self.keep = Path(directory).absolute(), every, keep

    def start(self, state: FitState) -> FitState:
        """Returns the newest saved state, or `state` if nothing is saved.

        Raises:
          ConfigError: the checkpoint has other settings or arrays (the error names them), another
            process saves in the directory, or it cannot be written.
        """
        if jax.process_index() == 0:
            self._held = files.hold(self.directory)
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    return self._restored(manager, step, state)
                except (FedragError, PermissionError, MemoryError):
                    raise
                except Exception as error:  # whatever Orbax and its backends raise
                    self._put_aside(step, error)
                    manager.reload()
        return state

    def _put_aside(self, step: int, error: Exception) -> None:
        """Renames an unreadable checkpoint, which another version may still read; the round is saved
        again."""
        folder = self.directory / str(step)
        why = _first_line(error)
        print(
            f"{folder} cannot be read ({why}): it is renamed, and its rounds are trained again",
            file=sys.stderr,
        )
        aside = folder.with_name(f"{step}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    def _restored(self, manager: ocp.CheckpointManager, step: int, state: FitState) -> FitState:
        saved = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about = saved["about"]
        named = _named(state.state)
        here = {name: [list(np.shape(x)), str(x.dtype)] for name, x in named.items()}
        open_ones = {n: about["settings"].get(n) for n, v in state.settings.items() if v is None}
        settings = state.settings | open_ones
        self._require_same("settings", about["settings"], settings)
        self._require_same("arrays", about["arrays"], here)
        arrays = {name: np.empty(x.shape, x.dtype) for name, x in named.items()}
        others = {name: np.empty(*kind) for name, kind in about["others"].items()}
        arrays |= others
        restore = ocp.args.Composite(arrays=ocp.args.StandardRestore(arrays))
        arrays = manager.restore(step, args=restore)["arrays"]
        # The rows of a population stay on the host.
        leaves = [
            arrays[name] if isinstance(x, np.ndarray) else jnp.array(arrays[name])
            for name, x in named.items()
        ]
        return FitState(
            round=step,
            state=jax.tree.unflatten(jax.tree.structure(state.state), leaves),
            retrieved=arrays.get("retrieved"),
            index={n.removeprefix("index."): arrays[n] for n in others if n != "retrieved"} or None,
            history=tuple(about["history"]),
            settings=settings,
        )

    def round_end(self, state: FitState, record: dict) -> None:
        if state.round % self.every and state.round != record["rounds"]:
            return
        arrays = {name: np.asarray(x) for name, x in _named(state.state).items()}
        about = {
            "settings": state.settings,
            "arrays": {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()},
            "history": list(state.history),
        }
        others = {f"index.{name}": np.asarray(x) for name, x in (state.index or {}).items()}
        if state.retrieved is not None:
            others["retrieved"] = state.retrieved
        about["others"] = {name: [list(x.shape), str(x.dtype)] for name, x in others.items()}
        arrays |= others
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        with files.writing(self.directory):
            try:
                with self._manager() as manager:
                    manager.save(state.round, args=args)
            except (OSError, ValueError) as error:  # of the backend, where a disk is full
                raise OSError(_first_line(error)) from error

    def _manager(self) -> ocp.CheckpointManager:
        # Not asynchronous: the next round reuses the memory that would still be read.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _require_same(self, what: str, saved: dict, here: dict) -> None:
        different = [
            f"{name} was {saved.get(name)}, is {here.get(name)}"
            for name in sorted({*saved, *here})
            if saved.get(name) != here.get(name)
        ]
        if different:
            raise ConfigError(
                f"checkpoint in {self.directory} comes from other {what}: {'; '.join(different)}. "
                "Set them back, or choose another directory"
            )


def _not_raised(record: logging.LogRecord) -> bool:
    """Orbax's threads log with a traceback what is raised as well, some after it was."""
    return "_SignalingThread" not in record.getMessage()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _named(state) -> dict[str, jax.Array]:
    """Leaves by their path, such as `state.trainable.layers.q_proj.lora_a`."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {
        "state." + jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat
    }
