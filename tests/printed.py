"""The code that README and the pages of the site print."""

import dataclasses
import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
# A comment above a block says why it is not run with the others: `<!-- not run: needs a server -->`.
MARK = re.compile(r"<!-- (slow)?(?:; )?(?:needs: ([\w, ]+)|not run: (.+))? -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      line: number of its first line on the page, from 1.
      language: the word behind the fence; "" for a shell.
      needs: modules without which it cannot run.
      not_run: the reason why it is only read; "" if it runs.
      slow: whether it takes more than seconds.
    """

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    not_run: str = ""
    slow: bool = False

    def runs(self) -> bool:
        """Returns whether this environment can run it."""
        return not self.not_run and all(importlib.util.find_spec(name) for name in self.needs)


def pages() -> list[str]:
    """Returns the paths of all pages, relative to the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found if "_build" not in path.parts)


def blocks_of(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    lines = (ROOT / page).read_text().splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a fence is not closed"
    found = []
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        mark = MARK.fullmatch(lines[first - 1])
        slow, needs, not_run = mark.groups() if mark else (None, None, None)
        found.append(
            Block(
                page,
                first + 2,
                lines[first].removeprefix("```"),
                "\n".join(lines[first + 1 : last]),
                tuple((needs or "").replace(",", " ").split()),
                not_run or "",
                bool(slow),
            )
        )
    return found


def python_of(page: str) -> list[Block]:
    """Returns the Python of a page."""
    return [block for block in blocks_of(page) if block.language == "python"]


def script(blocks: list[Block]) -> str:
    """Returns blocks of a page as one program, each line where it is on the page, for tracebacks."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"
