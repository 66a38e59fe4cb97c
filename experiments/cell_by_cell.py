"""The loop of an experiment: the cells that are missing, one after another, then the report."""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.inputs import replicates
from fedrag_jax.errors import DivergenceError


def compute_missing(
    config,
    folder: pathlib.Path,
    todo: Sequence[tuple[str, str, tuple[int, int]]],
    compute: Callable[..., Any],
    told: Callable[[Any], str],
    about: Callable[[str, str], dict[str, float]] = lambda name, setting: {},
) -> None:
    """Computes and keeps the cells that a folder lacks, and logs all that are not logged yet; one that
    diverges is told and left out.

    Args:
      todo: `(strategy, setting, (seed, split))` of each cell, by which it is known.
      compute: `compute(strategy, setting, seed, split) -> Cell`.
      told: what people are told of a cell.
      about: numbers of a strategy and setting, for Weights & Biases to know it by.
    """
    from experiments.reporting import cells
    from experiments.reporting.weights_and_biases import log_cell
    from fedrag_jax.tracking.processes import everywhere

    began, wandb = time.perf_counter(), config.wandb

    def log(cell):
        known = about(cell.strategy, cell.setting)
        log_cell(cell, folder, config.name, **wandb, config=config.to_dict(), **known)

    for i, (name, setting, pair) in enumerate(todo, 1):
        kept = cells.load(folder, name, setting, *pair)
        if everywhere(kept is not None):
            log(kept)
            continue
        where = f"{name}, {setting}, {cells.seeds_name(*pair)}"
        try:
            cell = compute(name, setting, *pair)
        except DivergenceError as error:  # one of many: the others are worth having
            print(f"{where}: {error}")
            continue
        cells.save(folder, cell)
        log(cell)
        seconds = time.perf_counter() - began
        print(f"[{i}/{len(todo)}] {where}: {told(cell)}  ({seconds:.0f} s so far)", flush=True)


def finished(config, folder: pathlib.Path, name: str, setting: str) -> list:
    """The cells of a strategy and setting that are there, of all pairs of seeds."""
    from experiments.reporting import cells

    found = (cells.load(folder, name, setting, *pair) for pair in replicates(config))
    return [cell for cell in found if cell]


def write_report(report, folder: pathlib.Path, others: str) -> pathlib.Path:
    """Writes a `Report` and prints it; returns the folder.

    Args:
      others: files that lie beside it.
    """
    written = report.write(folder)
    print(report.markdown())
    print(f"{folder}/: {others} {' '.join(written)}")
    return folder
