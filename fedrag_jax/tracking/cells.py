"""One strategy in one setting with one seed: the unit that is computed once and kept."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax.tracking.ledger import Cost


class Cell(NamedTuple):
    """A finished cell.

    Attributes:
      scores: per test question [Q], in [0, 1]; means over clients in the local setting.
      controls: single numbers in percent.
      curves: for each trained task its rounds: `round`, `loss`, `metrics`, `examples`, `seconds`.
    """

    strategy: str
    setting: str
    seed: int
    scores: dict[str, np.ndarray]
    controls: dict[str, float]
    cost: Cost
    curves: dict[str, list[dict[str, Any]]]


def path(folder: pathlib.Path, strategy: str, setting: str, seed: int) -> pathlib.Path:
    """Where a cell lies; deleting it has it computed anew."""
    return folder / "cells" / f"{strategy}-{setting}-seed{seed}"


def save(folder: pathlib.Path, cell: Cell) -> None:
    """Writes `scores.npz`, then `cell.json`, whose presence says that the cell is finished."""
    here = path(folder, cell.strategy, cell.setting, cell.seed)
    here.mkdir(parents=True, exist_ok=True)
    np.savez(here / "scores.npz", **cell.scores)
    about = {
        "strategy": cell.strategy,
        "setting": cell.setting,
        "seed": cell.seed,
        "controls": cell.controls,
        "cost": cell.cost._asdict(),
        "curves": cell.curves,
    }
    beside = here / "cell.json.tmp"
    beside.write_text(json.dumps(about) + "\n")
    beside.replace(here / "cell.json")


def load(folder: pathlib.Path, strategy: str, setting: str, seed: int) -> Cell | None:
    """A finished cell, or None."""
    here = path(folder, strategy, setting, seed)
    if not (here / "cell.json").exists():
        return None
    about = json.loads((here / "cell.json").read_text())
    with np.load(here / "scores.npz") as scores:
        return Cell(
            **about | {"cost": Cost(**about["cost"]), "scores": {k: scores[k] for k in scores}}
        )
