"""The report of a finished run: one self-contained page, and its tables and figures for a paper."""

import dataclasses
import functools
import importlib.resources
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from experiments.reporting.figures import pyplot
from experiments.reporting.tables import Row, Table, write_csv
from fedrag_jax import files


class Section(NamedTuple):
    """A section of a report.

    Attributes:
      name: name of the files of its table (`<name>.tex`) and figure (`<name>.png`, `<name>.pdf`).
      text: explanation of the table or figure.
      figure: a Matplotlib figure, or None.
    """

    heading: str
    name: str
    text: str
    table: Table | None = None
    figure: Any = None


@dataclasses.dataclass(frozen=True)
class Report:
    """A title, a paragraph, and sections; empty sections are left out.

    Attributes:
      rows: the rows behind the tables, by file name (`<name>.csv` or `<name>.jsonl`); empty files are
        not written.
      columns: the first columns of some CSV files, in order.
    """

    title: str
    text: str
    sections: Sequence[Section]
    rows: Mapping[str, Sequence[Row]] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        full = [s for s in self.sections if s.figure is not None or (s.table and s.table.rows)]
        object.__setattr__(self, "sections", full)

    def markdown(self) -> str:
        """Returns the report as Markdown, with the names of figures."""
        parts = [f"# {self.title}", self.text]
        for section in self.sections:
            parts += [f"## {section.heading}", section.text]
            if section.table:
                parts.append(section.table.markdown())
            if section.figure is not None:
                parts.append(f"![{section.heading}]({section.name}.png)")
        return "\n\n".join(part for part in parts if part) + "\n"

    def html(self, folder: pathlib.Path) -> str:
        """Returns the report as a self-contained HTML page, with config and manifest of the run."""
        about = {name: files.read_json(folder / f"{name}.json") for name in ("config", "manifest")}
        return _template().render(
            report=self,
            svg={s.name: _svg(s.figure, s.name) for s in self.sections if s.figure is not None},
            sessions=about["manifest"]["sessions"],
            about={name: json.dumps(value, indent=2) for name, value in about.items()},
        )

    def write(self, folder: pathlib.Path) -> list[str]:
        """Writes `report.html`, `table.md`, and every table, figure and file of rows; returns their
        names."""
        filled = {name: some for name, some in self.rows.items() if some}
        for name, some in filled.items():
            if name.endswith(".csv"):
                flat = [_flat(row) for row in some]
                order = [*self.columns.get(name, ()), *(key for row in flat for key in row)]
                write_csv(folder / name, flat, list(dict.fromkeys(order)))
            else:
                files.write_text(folder / name, "".join(json.dumps(row) + "\n" for row in some))
        written = [*filled, "report.html", "table.md"]
        files.write_text(folder / "report.html", self.html(folder))
        files.write_text(folder / "table.md", self.markdown())
        for section in self.sections:
            if section.table:
                written.append(f"{section.name}.tex")
                files.write_text(folder / written[-1], section.table.latex())
            if section.figure is not None:
                for form in ("png", "pdf"):
                    written.append(f"{section.name}.{form}")
                    with files.whole(folder / written[-1], "wb") as file:
                        section.figure.savefig(file, format=form)
                pyplot().close(section.figure)
        return written


def _flat(row: Row) -> Row:
    """Returns a row in which a group of values, such as those of a difference, is one for each."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        many = isinstance(value, Mapping)
        flat |= {f"{name}_{part}": x for part, x in value.items()} if many else {name: value}
    return flat


@functools.cache
def _template() -> jinja2.Template:
    text = importlib.resources.files(__package__).joinpath("report.html.jinja").read_text()
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


def _svg(figure, name: str) -> str:
    """The figure as an element of a page; `name` keeps its ids apart from those of others."""
    plt, file = pyplot(), io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg )", "", file.getvalue(), count=1, flags=re.DOTALL)
