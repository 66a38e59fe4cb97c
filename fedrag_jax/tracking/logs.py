"""Logs the rounds of a fit to a file or a terminal."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import jax

from fedrag_jax import files
from fedrag_jax.federated.callbacks import Callback, FitState


class JsonlLog(Callback):
    """Writes one JSON object per round, the record that `fit` describes.

    At the start the file is rewritten from the history of the state: empty for a new run, cut back to
    the round of the checkpoint for a resumed one. List this callback after the checkpointer.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def start(self, state: FitState) -> FitState:
        with files.writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, "".join(map(_line, state.history)))
        return state

    def round_end(self, state: FitState, record: dict) -> None:
        with files.writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))


class Progress(Callback):
    """Prints round, loss, seconds per round and time left to stderr, at most once per second.

    It also prints a line if the first round takes long, for example because a large model is compiled.
    If there are several processes, only the first one prints.

    Args:
      where: the start of each line, such as the regime.
      patience: seconds without a finished round before that line.
    """

    def __init__(self, where: str = "", patience: float = 10.0):
        self.where, self.patience = where and where + ", ", patience

    def start(self, state: FitState) -> FitState:
        self.ends, self.shown = [], 0.0
        if not jax.process_index():
            self.waiting = threading.Timer(self.patience, self._tell, [state.settings["task"]])
            self.waiting.daemon = True
            self.waiting.start()
        return state

    def end(self) -> None:
        if not jax.process_index() and "waiting" in vars(self):
            self.waiting.cancel()

    def _tell(self, task: str) -> None:
        print(
            f"{self.where}{task}: no round is done after {self.patience:g} s; the first one also "
            "compiles its program, which takes minutes for a large model",
            file=sys.stderr,
            flush=True,
        )

    def round_end(self, state: FitState, record: dict) -> None:
        now = time.perf_counter()
        if not self.ends and not jax.process_index():
            self.waiting.cancel()
        self.ends.append(now)
        if jax.process_index() or (now - self.shown < 1 and record["round"] < record["rounds"]):
            return
        self.shown = now
        # From end to end, because other fits may share the time; the first round compiles.
        per_round = record["seconds"] + record["refresh_seconds"]
        if len(self.ends) > 1:
            per_round = (now - self.ends[0]) / (len(self.ends) - 1)
        left = round(per_round * (record["rounds"] - record["round"]))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        print(
            f"{self.where}{state.settings['task']}: round {record['round']}/{record['rounds']}  "
            f"loss {loss}  {per_round:.2f} s/round  {clock} left",
            file=sys.stderr,
            flush=True,
        )


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
