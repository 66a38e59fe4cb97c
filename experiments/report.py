"""Writes the report of a finished run: a page, and tables and figures for a paper.

    python -m experiments.report runs/compare

Writes into the folder: report.html (tables that sort, figures, config, manifest and commands; it loads
nothing), table.md, and every table as LaTeX and every figure as PNG and PDF. Experiments do this when
they end; here it is done again, such as after an update of the package.
"""

import argparse
import importlib
import pathlib

from ml_collections import ConfigDict

from experiments.__main__ import COMMANDS
from experiments.launch import kept_config
from fedrag_jax.errors import ConfigError, FedragError
from fedrag_jax.files import read_json


def rebuild(folder: pathlib.Path) -> list[str]:
    """Rewrites the report of a run; returns the names of its files.

    Raises:
      ConfigError: the folder holds no run.
      DataError: a file of it is damaged.
    """
    paths = [folder / f"{name}.json" for name in ("config", "manifest")]
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"{folder} holds no run: {path} is missing; give a folder below runs/"
            )
    config, manifest = kept_config(paths[0]), read_json(paths[1])
    name = manifest.get("experiment")
    if name not in COMMANDS:
        raise ConfigError(f"{folder}/manifest.json names none of {[*COMMANDS]}, but {name!r}")
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    # In the order of the file: variants are shown as they were written.
    return experiment.report(ConfigDict(config, sort_keys=False), folder).write(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, nargs="+", help="of a run")
    for run in parser.parse_args().folder:
        try:
            print(f"{run}/: {' '.join(rebuild(run))}")
        except FedragError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
