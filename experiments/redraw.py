"""Draws the figure of the main table from a CSV file of its rows.

    python -m experiments.redraw docs/data/table/strategies.csv docs/strategies.png
    python -m experiments.redraw docs/data/real/strategies.csv docs/real.png --cost=flops

The docs keep the rows of their tables in docs/data, as the reports of runs write them.
"""

import argparse
import pathlib

from experiments.reporting.figures import COSTS, quality_against_cost
from experiments.reporting.tables import read_csv
from fedrag_jax.errors import FedragError


def main() -> None:
    """Reads the rows, draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=pathlib.Path, help="strategies.csv of a run")
    parser.add_argument("figure", type=pathlib.Path, help="file of the figure, .png or .pdf")
    parser.add_argument("--cost", choices=[*COSTS], default="seconds", help="cost on the x axis")
    asked = parser.parse_args()
    try:
        quality_against_cost(read_csv(asked.rows), asked.cost).savefig(asked.figure)
    except (FedragError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(asked.figure)


if __name__ == "__main__":
    main()
