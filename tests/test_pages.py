"""The Python of the pages that newcomers read runs from top to bottom, as it is printed."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    "docs/concepts.md",
    pytest.param("docs/getting-started.md", marks=pytest.mark.slow),
    pytest.param("docs/how-to.md", marks=pytest.mark.slow),
]


def code_of(page: str) -> str:
    """The blocks of a page one after the other, each line where it is on the page, for tracebacks."""
    lines, within = [], False
    for line in (ROOT / page).read_text().splitlines():
        opens, within = line == "```python", within and line != "```"
        lines.append(line if within else "")
        within = within or opens
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_it_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = code_of(page)
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.count("\n") >= code.count("print(")


def test_every_page_with_python_that_begins_with_the_package_is_run():
    """Fragments of the guides are not; a page whose first block imports `fedrag_jax as fr` is."""
    run = {str(getattr(page, "values", [page])[0]) for page in PAGES} | {"README.md"}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if re.search(r"```python\nimport fedrag_jax as fr", path.read_text()):
            assert str(path.relative_to(ROOT)) in run
