"""How an answer names the passages it comes from: by their numbers in the prompt, from 1 on."""

import re
from collections.abc import Iterable

UNKNOWN = "unknown"  # the answer where no passage holds one
_LIST = re.compile(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?")


def cite(numbers: Iterable[int]) -> str:
    """Numbers as they are to be written: "1, 3"; "0" for none."""
    return ", ".join(map(str, numbers)) or "0"


def cited(text: str, passages: int) -> tuple[int, ...] | None:
    """The numbers that a text cites, ascending and each once, () of "0"; None if it is no list of them.

    Args:
      passages: how many were read; a number beyond them makes the text no citation.
    """
    if not _LIST.fullmatch(text.strip()):
        return None
    numbers = sorted({int(number) for number in re.findall(r"\d+", text)})
    if numbers == [0]:
        return ()
    return tuple(numbers) if numbers[0] >= 1 and numbers[-1] <= passages else None
