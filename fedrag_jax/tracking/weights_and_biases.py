"""Logs the rounds of a fit to Weights & Biases, while it runs.

Panels of a task, over rounds, in a simulation and across machines:

| panel | |
|---|---|
| `loss`, and each metric | means over the examples of the round |
| `validation`, `epsilon` | if the training has them |
| `examples_seen` | since the start |
| `seconds_per_round` | of training |
| `bytes_up`, `bytes_down` | of the round |
| `clients_drawn`, `clients_answered` | numbers of clients |
| `clients_present`, `clients_refused` | the same, across machines only |
"""

import os
import pathlib
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import jax

from fedrag_jax import files
from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.callbacks import Callback, FitState

MODES = "online", "offline", "disabled"
LOGGED = "wandb.json"
PATIENCE_S = 30  # for a server that does not answer: training goes on, whatever it says
# Of a round's record, by the name of its panel.
CURVES = {"loss": "loss", "examples": "examples_seen", "seconds": "seconds_per_round",
          "validation": "validation", "epsilon": "epsilon", "bytes_up": "bytes_up",
          "bytes_down": "bytes_down", "drawn": "clients_drawn",
          "present": "clients_present"}  # fmt: skip
COUNTED = {"clients": "clients_answered", "refused": "clients_refused"}  # only how many
METRICS = {"tokens": "tokens_per_example", "written_tokens": "written_tokens_per_rollout"}


def panels(task: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a round's record, by panel, and `round` itself."""
    found = {name: record.get(key) for key, name in CURVES.items()}
    found |= {name: len(record[key]) for key, name in COUNTED.items() if key in record}
    found |= {METRICS.get(key, key): value for key, value in record["metrics"].items()}
    named = {f"{task}/{name}": value for name, value in found.items() if value is not None}
    return named | {"round": record["round"]}


class WandbLog(Callback):
    """Logs every round as it ends. List this callback after the checkpointer.

    A resumed fit continues its online run. Offline it starts a new run, which repeats the earlier
    rounds. If mode "online" finds no key or no server, the callback falls back to "offline" and prints
    a note; `wandb sync` uploads the run later. If there are several processes, only the first one logs.

    Args:
      folder: folder of the run's files, one per fit.
      config: settings to show beside the run, as JSON types.
      name: name of the run; by default Weights & Biases chooses one.

    Raises:
      ConfigError: an unknown mode.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        project: str = "fedrag",
        mode: str = "online",
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ):
        if mode not in MODES:
            raise ConfigError(f"wandb must be one of {MODES}, got {mode!r}")
        self.folder, self.mode = pathlib.Path(folder), mode
        self.about = {"project": project, "config": dict(config or {}), "name": name}
        self.run: Any = None

    def start(self, state: FitState) -> FitState:
        if self.mode == "disabled" or jax.process_index():
            return state
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._begin(state)
        task = state.settings["task"]
        self.run.define_metric("round", hidden=True)
        self.run.define_metric("*", step_metric="round")
        for record in state.history:
            self._log(task, record)
        return state

    def round_end(self, state: FitState, record: dict) -> None:
        if self.run is None:
            return
        self._log(state.settings["task"], record)

    def end(self) -> None:
        if self.run is not None:
            self.run.finish()
            self.run = None

    def _begin(self, state: FitState) -> None:
        """Opens a run: the former one of an online fit, otherwise a new one."""
        import wandb  # slow, and only here

        former = files.kept(files.read_json, self.folder / LOGGED) if state.round else None
        if self.mode == "online":
            try:
                require_key()
                if former and former["online"]:
                    self.logged = former
                else:
                    self.logged = {"id": secrets.token_hex(4), "online": True, "round": 0}
                self.run = self._opened("online")
                return
            except (wandb.errors.Error, TimeoutError, OSError) as error:
                why = str(error).strip().partition("\n")[0]
                print(
                    f"wandb: no server can be used ({why}): logging offline. `wandb sync` uploads the "
                    "run later",
                    file=sys.stderr,
                    flush=True,
                )
        # A run that could not begin keeps its id.
        self.logged = {"id": secrets.token_hex(4), "online": False, "round": 0}
        self.run = self._opened("offline")

    def _opened(self, mode: str):
        import wandb

        return wandb.init(
            mode=mode,
            id=self.logged["id"],
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # several fits of a process, or a run of the caller's
            dir=self.folder,
            settings=quiet(),
            **self.about,
        )

    def _log(self, task: str, record: Mapping[str, Any]) -> None:
        """Logs a round, unless the run has it: a fit may resume from an older checkpoint."""
        if record["round"] <= self.logged["round"]:
            return
        self.run.log(panels(task, record))
        self.logged["round"] = record["round"]
        files.write_json(self.folder / LOGGED, self.logged, indent=1)


def require_key() -> None:
    """Raises `wandb.errors.UsageError` if there is no API key."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise wandb.errors.UsageError("no API key found")


def quiet(**more: Any):
    """Returns settings of a run that prints nothing and does not wait forever."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        init_timeout=min(PATIENCE_S, wandb.setup().settings.init_timeout),
        finish_timeout=PATIENCE_S,
        **more,
    )
