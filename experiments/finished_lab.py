"""The systems of a finished comparison, for experiments that test them in another way."""

import functools
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.lab import Lab, untuned_cell
from experiments.launch import kept_config
from experiments.loading import load_data
from experiments.reporting import cells
from experiments.run import Point
from fedrag_jax.errors import ConfigError


class FinishedLab(Lab):
    """The lab of a finished comparison, in its own folder.

    Args:
      of: the folder.

    Attributes:
      config: of the comparison.
      tuned: `tuned(strategy, regime, seed, split)`, read from disk; the last is kept.
    """

    def __init__(self, of: pathlib.Path):
        config = ConfigDict(kept_config(of / "config.json"), sort_keys=False)
        super().__init__(config, load_data(config), of)
        self.tuned = functools.lru_cache(maxsize=1)(self._tuned)

    def _tuned(self, strategy: str, regime: str, seed: int, split: int):
        if strategy == "none":
            return self.system(seed)
        (system,), _ = self.tuned_systems(strategy, regime, seed, split)
        return system


def tested(strategies: Sequence[str], regimes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns all pairs of a strategy and a regime; the untuned system is of the first regime alone."""
    return [(s, r) for s in strategies for r in regimes if s != "none" or r == regimes[0]]


def untuned_of_other_seeds(config, folder: pathlib.Path, point: Point) -> cells.Cell | None:
    """Returns the untuned cell of another pair of seeds, if finished; seeds do not change it."""
    known = untuned_cell(config, folder / point.folder) if point.name == "none" else None
    return known and known._replace(seed=point.seed, split=point.split)


def require_run(of: pathlib.Path, setting: str = "config.of") -> None:
    """Checks that a folder holds a run.

    Args:
      setting: the setting that names the folder.

    Raises:
      ConfigError: it holds none.
    """
    if not (of / "config.json").exists():
        raise ConfigError(f"{setting}: {of} holds no run; run compare_strategies first")


def require_finished(of: pathlib.Path, points: Sequence[Point], setting: str = "config.of") -> None:
    """Checks that a folder has all systems that are tested.

    Args:
      points: strategies in regimes; their folders do not matter.
      setting: the setting that names the folder.

    Raises:
      ConfigError: no run, an unfinished cell, a regime of lone clients.
    """
    require_run(of, setting)
    for point in points:
        if point.regime.startswith("local"):
            raise ConfigError(
                f"config.regimes: {point.regime!r} has a system for each client; leave it out"
            )
        if cells.load(of, point.name, point.regime, point.seed, point.split) is None:
            raise ConfigError(
                f"{setting}: {of} has no finished cell ({point.name}, {point.regime}, "
                f"{cells.seeds_name(point.seed, point.split)}): compute it by compare_strategies, or "
                "ask for less here"
            )
