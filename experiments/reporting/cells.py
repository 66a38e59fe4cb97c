"""Cells: one strategy in one regime with one pair of seeds, computed once and stored."""

import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedrag_jax import files
from fedrag_jax.errors import DataError
from fedrag_jax.tracking.ledger import Cost

CLUSTERS = "clusters"  # beside the scores in their file


class Cell(NamedTuple):
    """A finished cell.

    Attributes:
      seed: seed of adapters, client sampling and shuffling.
      split: seed of the partition.
      scores: per test question [Q], in [0, 1], or in nats (`nll`); means over clients in the local
        regime.
      controls: single numbers, in percent or counts.
      client_em: EM in percent of the model that each client would use, on test questions in the
        proportions of its own topics; empty if no client holds the topics of test questions.
      curves: the rounds of each trained task: `round`, `loss`, `metrics`, `examples`, `seconds` and,
        with early stopping, `validation`.
      clusters: int [Q], see `data.examples.clusters`.
      labels: labels of the tasks of `curves` in figures; their names by default.
    """

    strategy: str
    regime: str
    seed: int
    split: int
    scores: dict[str, np.ndarray]
    controls: dict[str, float]
    client_em: list[float]
    cost: Cost
    curves: dict[str, list[dict[str, Any]]]
    clusters: np.ndarray
    labels: Mapping[str, str] = MappingProxyType({})


def path(folder: pathlib.Path, strategy: str, regime: str, seed: int, split: int) -> pathlib.Path:
    """Returns the folder of a cell; delete it to compute the cell again."""
    return folder / "cells" / f"{strategy}-{regime}-{seeds_name(seed, split)}"


def seeds_name(seed: int, split: int) -> str:
    """`seed0`, or `seed0-split1` where they differ."""
    return f"seed{seed}" + (f"-split{split}" if split != seed else "")


def save(folder: pathlib.Path, cell: Cell) -> None:
    """Writes `scores.npz`, then `cell.json`, whose presence marks a finished cell."""
    here = path(folder, cell.strategy, cell.regime, cell.seed, cell.split)
    with files.writing(here):
        here.mkdir(parents=True, exist_ok=True)
    with files.whole(here / "scores.npz", "wb") as file:
        np.savez_compressed(file, **cell.scores, **{CLUSTERS: cell.clusters})
    about = {
        "strategy": cell.strategy,
        "regime": cell.regime,
        "seed": cell.seed,
        "split": cell.split,
        "controls": cell.controls,
        "client_em": cell.client_em,
        "cost": cell.cost._asdict(),
        "curves": cell.curves,
        "labels": dict(cell.labels),
    }
    files.write_json(here / "cell.json", about)


def load(folder: pathlib.Path, strategy: str, regime: str, seed: int, split: int) -> Cell | None:
    """Returns a finished cell; None if there is none or, with a message, if a file is damaged.

    Raises:
      DataError: another version wrote it.
    """
    here = path(folder, strategy, regime, seed, split)
    return files.kept(lambda about: load_folder(about.parent), here / "cell.json")


def load_folder(here: pathlib.Path) -> Cell:
    """Returns the finished cell of a folder.

    Raises:
      DataError: another version wrote it, or (`files.DamagedError`) a file is damaged.
    """
    about = files.read_json(here / "cell.json")
    if "setting" in about:  # what a regime was called once
        about["regime"] = about.pop("setting")
    cost = Cost.of(about["cost"], here / "cell.json")
    scores = _scores(here / "scores.npz")
    if CLUSTERS not in scores:
        raise DataError(
            f"{here / 'scores.npz'} has no {CLUSTERS}: another version of fedrag_jax wrote it; remove "
            "its run, or choose another --config.name"
        )
    return Cell(**about | {"cost": cost, CLUSTERS: scores.pop(CLUSTERS), "scores": scores})


def _scores(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of the file by name."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise files.DamagedError(path, error) from error
