"""Runs an experiment: resolves its config, computes missing cells, and writes a report.

An experiment is a value, `Experiment`, at the end of its own module.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from experiments.launch import settled_config
from experiments.loading import replicates
from experiments.pages import return_pages
from experiments.reporting import cells
from experiments.reporting.page import Report
from experiments.reporting.weights_and_biases import log_cell
from fedrag_jax.errors import DivergenceError
from fedrag_jax.tracking.manifest import write_manifest
from fedrag_jax.tracking.processes import everywhere

NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Point:
    """The key of a cell.

    Attributes:
      name, regime: for example a strategy, and its regime.
      seed, split: seeds of the model and of the partition.
      about: numbers that identify the cell in Weights & Biases.
      folder: folder of its cells, below the run's folder.
    """

    name: str
    regime: str
    seed: int
    split: int
    about: Mapping[str, float] = dataclasses.field(default_factory=lambda: NOTHING)
    folder: str = ""

    def __str__(self):
        parts = self.folder, self.name, self.regime, cells.seeds_name(self.seed, self.split)
        return ", ".join(part for part in parts if part)

    def finished(self, folder: pathlib.Path) -> cells.Cell | None:
        """Returns the cell from the folder of a run, if it is finished."""
        where = self.name, self.regime, self.seed, self.split
        return cells.load(folder / self.folder, *where)


class OpensLab(Protocol):
    """Opens the data and models of a config; the lab has a `dataset`. Writes nothing.

    Raises:
      ConfigError, DataError: errors that would otherwise occur later.
    """

    def __call__(self, config: Any, folder: pathlib.Path, /) -> Any: ...


class ListsPoints(Protocol):
    """Returns all points, in the order of computation."""

    def __call__(self, lab: Any, /) -> Sequence[Point]: ...


class ComputesCell(Protocol):
    """Computes one point.

    Raises:
      DivergenceError: training diverges; other points are not affected.
    """

    def __call__(self, lab: Any, point: Point, /) -> cells.Cell: ...


class SummarisesCell(Protocol):
    """Returns the line that is printed for a finished cell."""

    def __call__(self, cell: cells.Cell, /) -> str: ...


class MakesReport(Protocol):
    """Builds the report of the finished cells."""

    def __call__(self, config: Any, folder: pathlib.Path, /) -> Report: ...


class MeasuresControls(Protocol):
    """Measures controls once, after the cells, and stores them in the lab's folder."""

    def __call__(self, lab: Any, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment: points, their computation, and the report.

    Attributes:
      name: name of its module and its config.
      free: config settings that may differ between calls that share a folder.
      defined: settings that define the names of points; calls may add names, but not change one.
    """

    name: str
    free: tuple[str, ...]
    lab: OpensLab
    points: ListsPoints
    compute: ComputesCell
    summary: SummarisesCell
    report: MakesReport
    controls: MeasuresControls = lambda lab: None
    defined: tuple[str, ...] = ()


def run(experiment: Experiment, config, runs: str) -> pathlib.Path:
    """Computes missing cells, then writes the report; returns the folder, `runs/<config.name>`.

    Raises:
      ConfigError: the experiment refuses the config, or the folder holds results of another.
    """
    folder = pathlib.Path(runs) / config.name
    lab = experiment.lab(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, (*experiment.free, "wandb"), experiment.defined)
    seeds = [list(pair) for pair in replicates(config)]
    write_manifest(folder, lab.dataset, experiment=experiment.name, seeds=seeds)
    points, began = experiment.points(lab), time.perf_counter()
    for number, point in enumerate(points, 1):
        cell, new = _cell(experiment, lab, point, folder)
        if cell is None:
            continue
        how: dict[str, Any] = {"config": config.to_dict(), **config.wandb, **point.about}
        # Beside its cells: points of several folders may share a name.
        log_cell(cell, folder / point.folder, config.name, place=point.folder, **how)
        if new:
            line, seconds = experiment.summary(cell), time.perf_counter() - began
            print(f"[{number}/{len(points)}] {point}: {line}  ({seconds:.0f} s so far)", flush=True)
            return_pages()
    experiment.controls(lab)
    report = experiment.report(config, folder)
    written = report.write(folder)
    print(report.markdown())
    print(f"{folder}/: {' '.join(written)}")
    return folder


def _cell(experiment: Experiment, lab, point: Point, folder: pathlib.Path):
    """Returns the cell and whether it is new; None if training diverged, which is printed."""
    known = point.finished(folder)
    if everywhere(known is not None):
        return known, False
    try:
        cell = experiment.compute(lab, point)
    except DivergenceError as error:
        print(f"{point}: {error}", flush=True)
        return None, False
    cells.save(folder / point.folder, cell)
    return cell, True


def finished(config, folder: pathlib.Path, name: str, regime: str) -> list[cells.Cell]:
    """The cells of a name and regime that are there, of all pairs of seeds."""
    points = (Point(name, regime, *pair) for pair in replicates(config))
    return [cell for point in points if (cell := point.finished(folder))]
