"""Finds and reads the files of a folder, and splits them into passages."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedrag_jax.data.examples import Passage, require_whole
from fedrag_jax.data.file_kinds import READERS, Document
from fedrag_jax.errors import ConfigError, DataError


class Found(NamedTuple):
    """The content of a folder.

    Attributes:
      files: the readable files, in the order of their paths.
      left_out: the other files, each with the reason.
    """

    files: list[pathlib.Path]
    left_out: dict[pathlib.Path, str]


def find(folder: str | pathlib.Path) -> Found:
    """Returns the files in a folder, at any depth; for a file, the file itself.

    Hidden files and folders are ignored. Links to folders and other types of files are left out.

    Raises:
      DataError: the path does not exist, or it has no file of a readable type.
    """
    root = pathlib.Path(folder)
    if not root.exists():
        raise DataError(f"no documents: {root} is neither a folder nor a file")
    told = {root: _fault(root)} if root.is_file() else dict(sorted(_walk(root)))
    found = Found(
        [path for path, fault in told.items() if not fault],
        {path: fault for path, fault in told.items() if fault},
    )
    if not found.files:
        raise DataError(
            f"no documents in {root}: {len(told)} files, none of them "
            f"{', '.join(READERS)}; give another folder"
        )
    return found


def _walk(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """Every path below, and why it is left out; "" where it is not."""
    path = folder
    try:
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from _walk(path)
            else:
                yield path, _fault(path)
    except OSError as error:
        yield path, f"cannot be looked at ({error.strerror})"


def _fault(path: pathlib.Path) -> str:
    if path.is_dir():
        return "a link to a folder, which is not followed; index that folder"
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "no ordinary file"
    if path.suffix.lower() in READERS:
        return ""
    kind = f"{path.suffix} files" if path.suffix else "files without an ending"
    return f"{kind} are not read; convert them to one of {', '.join(READERS)}"


def name_of(path: pathlib.Path, root: pathlib.Path) -> str:
    """Returns the name of a file in a folder of documents, or of the only document."""
    return path.relative_to(root).as_posix() if path != root else path.name


def read(path: pathlib.Path, root: pathlib.Path) -> list[Document]:
    """Returns the documents of a file: one, or several for JSON lines.

    Raises:
      ConfigError: the library for such files is missing.
      DataError: the file cannot be read as the type of its name.
    """
    try:
        found = [*READERS[path.suffix.lower()](path, name_of(path, root))]
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever a parser makes of a damaged file
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    for document in found:
        require_whole(document.title + document.text, f"{path}:")
    return [d if d.title else dataclasses.replace(d, title=path.stem) for d in found]


def split(document: Document, tokenizer, tokens: int = 200, overlap: int = 40) -> list[Passage]:
    """Splits a document into passages of at most `tokens` tokens that overlap.

    Cuts are between words; if the last third of a passage has a blank line or the end of a sentence,
    the cut is there. Passages get the ids `document.id#0` and so on. A document with its own id that
    needs no cut keeps its id.

    Args:
      tokens: maximum tokens of a passage, without special tokens.
      overlap: maximum tokens that a passage shares with the previous one; words are not cut for it.

    Raises:
      ConfigError: fewer than one token, or an overlap of half of them or more.
    """
    if tokens < 1 or not 0 <= overlap < max(tokens / 2, 1):
        raise ConfigError(
            f"passages need tokens >= 1 and 0 <= overlap < tokens / 2, got {tokens} and {overlap}"
        )
    # Runs of white space say nothing, and NUL characters neither.
    text = re.sub(r"[^\S\n]{2,}", " ", document.text.replace("\0", " ")).strip()
    text = re.sub(r"\n\s*\n\s*", "\n\n", text)
    offsets = [
        (start, end)
        for start, end in tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        if end > start
    ]
    pieces, first = [], 0
    while first < len(offsets):
        last = min(first + tokens, len(offsets))
        if last < len(offsets):
            last = _cut(text, offsets, first, last)
        if piece := text[offsets[first][0] : offsets[last - 1][1]].strip():
            pieces.append(piece)
        if last == len(offsets):
            break
        following = max(last - overlap, first + 1)
        while following < last and not _begins_word(text, offsets[following][0]):
            following += 1
        first = following
    if document.named and len(pieces) == 1:
        return [Passage(document.id, document.title, *pieces)]
    return [Passage(f"{document.id}#{i}", document.title, p) for i, p in enumerate(pieces)]


def _begins_word(text: str, start: int) -> bool:
    """Tokens of some tokenizers begin with the space before a word."""
    return text[start].isspace() or text[start - 1].isspace()


def _cut(text: str, offsets: Sequence[tuple[int, int]], first: int, last: int) -> int:
    """The best place for a cut at `last` or up to a third before it."""
    places = range(last, max(last - (last - first) // 3, first + 1) - 1, -1)

    def gap(place: int) -> tuple[int, str]:
        """Returns the start of the white space around a place, and the white space."""
        start = stop = offsets[place - 1][1]
        while start and text[start - 1].isspace():
            start -= 1
        while stop < len(text) and text[stop].isspace():
            stop += 1
        return start, text[start:stop]

    def paragraph(place: int) -> bool:
        return gap(place)[1].count("\n") > 1

    def sentence(place: int) -> bool:
        start, space = gap(place)
        return (bool(space) and text[start - 1] in ".!?…") or text[start - 1] in "。！？"

    def word(place: int) -> bool:
        return bool(gap(place)[1])

    for good in (paragraph, sentence, word):
        if found := next((place for place in places if good(place)), None):
            return found
    return last
