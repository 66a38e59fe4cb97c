"""Citations: an answer names its passages by their numbers in the prompt, starting at 1."""

import re
from collections.abc import Iterable

UNKNOWN = "unknown"  # the answer where no passage holds one
_LIST = re.compile(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?")


def cite(numbers: Iterable[int]) -> str:
    """Formats a list of numbers as the generator should write it: "1, 3"; "0" for none."""
    return ", ".join(map(str, numbers)) or "0"


def cited(text: str, passages: int) -> tuple[int, ...] | None:
    """Returns the numbers in a citation, sorted and unique; () for "0"; None for any other text.

    Args:
      passages: number of passages in the prompt; a text with a larger number is not a citation.
    """
    if not _LIST.fullmatch(text.strip()):
        return None
    numbers = sorted({int(number) for number in re.findall(r"\d+", text)})
    if numbers == [0]:
        return ()
    return tuple(numbers) if numbers[0] >= 1 and numbers[-1] <= passages else None
