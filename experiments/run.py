"""How an experiment runs: its config is settled, the cells that are missing are computed, a report is
written. An experiment itself is a value, `Experiment`, in a module of its own that ends with it.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from experiments.launch import settled_config
from experiments.loading import replicates
from experiments.reporting import cells
from experiments.reporting.page import Report
from experiments.reporting.weights_and_biases import log_cell
from fedrag_jax.errors import DivergenceError
from fedrag_jax.tracking.manifest import write_manifest
from fedrag_jax.tracking.processes import everywhere

NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Point:
    """What a cell is known by.

    Attributes:
      name, regime: such as a strategy, and where it is trained.
      seed, split: of the model, and of who holds what.
      about: numbers for Weights & Biases to know it by.
      folder: of its cells, below that of the run.
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
        """The cell in the folder of a run, if it is there."""
        where = self.name, self.regime, self.seed, self.split
        return cells.load(folder / self.folder, *where)


class OpensLab(Protocol):
    """Data and models of a config, with a `dataset`; writes nothing.

    Raises:
      ConfigError, DataError: what could only fail later.
    """

    def __call__(self, config: Any, folder: pathlib.Path, /) -> Any: ...


class ListsPoints(Protocol):
    """All points, in the order they are computed."""

    def __call__(self, lab: Any, /) -> Sequence[Point]: ...


class ComputesCell(Protocol):
    """One point.

    Raises:
      DivergenceError: training diverges, which leaves the others alone.
    """

    def __call__(self, lab: Any, point: Point, /) -> cells.Cell: ...


class TellsCell(Protocol):
    """What people are told of a cell as it is done, a line."""

    def __call__(self, cell: cells.Cell, /) -> str: ...


class MakesReport(Protocol):
    """Rows, tables and figures of the cells that are there."""

    def __call__(self, config: Any, folder: pathlib.Path, /) -> Report: ...


class MeasuresControls(Protocol):
    """What is measured once, after the cells, and kept in the lab's folder."""

    def __call__(self, lab: Any, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured, and how it is told.

    Attributes:
      name: of its module and its config.
      free: settings of the config that may differ between calls whose cells lie side by side.
    """

    name: str
    free: tuple[str, ...]
    lab: OpensLab
    points: ListsPoints
    compute: ComputesCell
    told: TellsCell
    report: MakesReport
    controls: MeasuresControls = lambda lab: None


def run(experiment: Experiment, config, runs: str) -> pathlib.Path:
    """Everything that is missing, then the report; returns the folder, `runs/<config.name>`.

    Raises:
      ConfigError: the experiment refuses the config, or the folder holds results of another.
    """
    folder = pathlib.Path(runs) / config.name
    lab = experiment.lab(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    settled_config(config, folder, free=(*experiment.free, "wandb"))
    seeds = [list(pair) for pair in replicates(config)]
    write_manifest(folder, lab.dataset, experiment=experiment.name, seeds=seeds)
    points, began = experiment.points(lab), time.perf_counter()
    for number, point in enumerate(points, 1):
        cell, new = _cell(experiment, lab, point, folder)
        if cell is None:
            continue
        how: dict[str, Any] = {"config": config.to_dict(), **config.wandb, **point.about}
        # Beside its cells: points of several folders may share a name.
        log_cell(cell, folder / point.folder, config.name, **how)
        if new:
            told, seconds = experiment.told(cell), time.perf_counter() - began
            print(f"[{number}/{len(points)}] {point}: {told}  ({seconds:.0f} s so far)", flush=True)
    experiment.controls(lab)
    report = experiment.report(config, folder)
    written = report.write(folder)
    print(report.markdown())
    print(f"{folder}/: {' '.join(written)}")
    return folder


def _cell(experiment: Experiment, lab, point: Point, folder: pathlib.Path):
    """`(cell, whether it is new)`; None where training diverges, which is told: one of many."""
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
