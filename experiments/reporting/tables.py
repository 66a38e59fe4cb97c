"""Tables as Markdown, LaTeX and HTML, and rows as CSV."""

import csv
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from fedrag_jax.errors import DataError
from fedrag_jax.files import whole

Row = Mapping[str, Any]
MISSING = "–"
_LATEX = {
    "–": "--", "±": r"$\pm$", "×": r"$\times$", "≈": r"$\approx$", "∞": r"$\infty$",
    "α": r"$\alpha$", "ε": r"$\varepsilon$", "μ": r"$\mu$",
}  # fmt: skip


class Column(NamedTuple):
    """A column heading, and the function that formats a row's value."""

    title: str
    show: Callable[[Row], str]
    align: str = "right"


def words(title: str, key: str) -> Column:
    """A column of unformatted values."""
    return Column(title, lambda row: MISSING if row.get(key) is None else str(row[key]), "left")


def number(title: str, key: str, digits: int = 1, unit: float = 1.0) -> Column:
    """A column of numbers in some unit; a dash for missing values."""

    def show(row):
        value = row.get(key)
        return MISSING if value is None else f"{value / unit:.{digits}f}"

    return Column(title, show)


def interval(title: str, key: str, digits: int = 1) -> Column:
    """A column of numbers with intervals (`_low`, `_high`) and the standard deviation over seeds
    (`_sd`) if there are several; a dash for missing values."""

    def show(row):
        value, low, high, sd = (row.get(key + part) for part in ("", "_low", "_high", "_sd"))
        if value is None:
            return MISSING
        spread = "" if sd is None else f" ± {sd:.{digits}f}"
        return f"{value:.{digits}f}{spread} [{low:.{digits}f}, {high:.{digits}f}]"

    return Column(title, show)


def signed(value: float, digits: int = 1) -> str:
    """Returns `+1.2` or `-0.0`, the sign that of the value itself; what is zero but for rounding errors
    is `+0.0`."""
    return f"{round(value, 9) + 0.0:+.{digits}f}"


def difference(title: str, prefix: str = "", digits: int = 1) -> Column:
    """A column of signed differences with intervals; a dash for missing values."""

    def show(row):
        numbers = [row.get(f"{prefix}{name}") for name in ("difference", "low", "high")]
        if None in numbers:
            return MISSING
        value, low, high = (signed(x, digits) for x in numbers)
        return f"{value} [{low}, {high}]"

    return Column(title, show)


def p_value(title: str, key: str) -> Column:
    """A column of probabilities with three decimals."""

    def show(row):
        value = row.get(key)
        return MISSING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"

    return Column(title, show)


class Table(NamedTuple):
    """Rows, and the columns in which they are shown."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        return self._as("pipe")

    def latex(self) -> str:
        """Returns a LaTeX tabular for a paper that loads booktabs."""
        text = self._as("latex_booktabs")
        for sign, command in _LATEX.items():
            text = text.replace(sign, command)
        return text + "\n"

    def html(self) -> str:
        """A `<table>`."""
        return self._as("html")

    def _as(self, form: str) -> str:
        return tabulate(
            [[column.show(row) for column in self.columns] for row in self.rows],
            [column.title for column in self.columns],
            tablefmt=form,
            colalign=[column.align for column in self.columns] if self.rows else None,
            disable_numparse=True,
        )


def read_csv(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of a file by `write_csv`; numbers are parsed, empty fields are None.

    Raises:
      DataError: no rows.
    """
    with open(path, newline="") as file:
        rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _value(text: str) -> str | float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def write_csv(path: pathlib.Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Writes rows in full precision; missing values are empty. Default: all columns."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with whole(path, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
