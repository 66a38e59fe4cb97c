"""Files of a folder as passages: text, Markdown, HTML, PDF and JSON lines.

pip install 'fedrag-jax[documents]' for Markdown, HTML and PDF
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as it was found.

    Attributes:
      id: its path within the folder, with "/", and the line's id where it is one line of many.
    """

    id: str
    title: str
    text: str


def find(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The files that can be read, in the order of their paths; of one file, itself.

    Hidden files and folders are left out, and links to folders are not followed.

    Raises:
      DataError: nothing is there, or nothing of a kind that can be read.
    """
    root = pathlib.Path(folder)
    if not root.exists():
        raise DataError(f"no documents: {root} is neither a folder nor a file")
    paths = [root] if root.is_file() else sorted(_walk(root))
    found = [path for path in paths if path.suffix.lower() in READERS]
    if not found:
        raise DataError(
            f"no documents in {root}: {len(paths)} files, none of them "
            f"{', '.join(READERS)}; give another folder"
        )
    return found


def read(path: pathlib.Path, root: pathlib.Path) -> list[Document]:
    """The documents of a file, one unless it is JSON lines.

    Raises:
      ConfigError: the library for such files is missing.
      DataError: a file that cannot be read as what its name says.
    """
    name = path.relative_to(root).as_posix() if path != root else path.name
    try:
        found = [
            Document(f"{name}{part}", title or path.stem, text)
            for part, title, text in READERS[path.suffix.lower()](path)
        ]
        for document in found:
            (document.title + document.text).encode()  # half characters are no text
        return found
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever a parser makes of a damaged file
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def split(document: Document, tokenizer, tokens: int = 200, overlap: int = 40) -> list[Passage]:
    """A document as passages of so many tokens or fewer, each beginning with the end of the one before.

    Cuts are between words, at a blank line or the end of a sentence where one is in the last third.

    Args:
      tokens: of a passage, without special tokens.
      overlap: tokens that a passage shares with the one before, at most; words are not cut for it.

    Raises:
      ConfigError: fewer than one token, or an overlap that is not smaller than half of them.
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
    passages, first = [], 0
    while first < len(offsets):
        last = min(first + tokens, len(offsets))
        if last < len(offsets):
            last = _cut(text, offsets, first, last)
        if piece := text[offsets[first][0] : offsets[last - 1][1]].strip():
            passages.append(Passage(f"{document.id}#{len(passages)}", document.title, piece))
        if last == len(offsets):
            break
        following = max(last - overlap, first + 1)
        while following < last and not _begins_word(text, offsets[following][0]):
            following += 1
        first = following
    return passages


def _begins_word(text: str, start: int) -> bool:
    """Tokens of some tokenizers begin with the space before a word."""
    return text[start].isspace() or text[start - 1].isspace()


def _cut(text: str, offsets: Sequence[tuple[int, int]], first: int, last: int) -> int:
    """The best place for a cut at `last` or up to a third before it."""
    places = range(last, max(last - (last - first) // 3, first + 1) - 1, -1)

    def gap(place: int) -> tuple[int, str]:
        """Where the white space around a place begins, and the white space."""
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


# --- kinds of files --------------------------------------------------------------------------------


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _decoded(path: pathlib.Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not {encoding}; save the file as UTF-8"
        ) from error


def _text(path: pathlib.Path):
    yield "", "", _decoded(path)


def _html(path: pathlib.Path):
    yield "", *_of_html(_decoded(path))


def _markdown(path: pathlib.Path):
    parser = _library("markdown_it", "Markdown").MarkdownIt("commonmark").enable("table")
    title, text = _of_html(parser.render(_decoded(path)))
    yield "", title, text


BLOCKS = ("p", "div", "pre", "table", "section", "article", "ul", "ol", "h1", "h2", "h3", "h4", "h5",
          "h6", "blockquote", "header", "footer")  # fmt: skip
ROWS = ("li", "tr", "br")


def _of_html(html: str) -> tuple[str, str]:
    bs4 = _library("bs4", "HTML")
    soup = bs4.BeautifulSoup(html, "html.parser")
    heading = soup.title or soup.h1
    title = " ".join(heading.get_text(" ").split()) if heading else ""
    for gone in soup(["title", "script", "style", "noscript", "template", "nav"]):
        gone.decompose()
    kept = {id(words) for pre in soup("pre") for words in pre.find_all(string=True)}
    for words in soup.find_all(string=True):
        if type(words) not in (bs4.NavigableString, bs4.CData):
            words.extract()  # comments and declarations
        elif id(words) not in kept:
            words.replace_with(re.sub(r"\s+", " ", words))
    for block in soup([*BLOCKS, *ROWS]):
        apart = "\n" if block.name in ROWS else "\n\n"
        block.insert_before(apart)
        block.insert_after(apart)
    for cell in soup(["td", "th"]):
        cell.insert_after(" ")
    lines = [" ".join(line.split()) for line in soup.get_text("").splitlines()]
    return title, "\n".join(
        line for i, line in enumerate(lines) if line or (i and lines[i - 1])
    ).strip()


def _pdf(path: pathlib.Path):
    reader = _library("pypdf", "PDF").PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise DataError(f"{path}: is encrypted; save it without a password")
    text = "\n\n".join(page.extract_text() for page in reader.pages)
    if not text.strip():
        raise DataError(f"{path}: has no text in it, perhaps pictures of pages: recognise it first")
    yield "", str((reader.metadata or {}).get("/Title") or ""), text


def _json_lines(path: pathlib.Path):
    lines: dict[str, int] = {}
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            part, title, text = row.get("id"), row.get("title") or "", row["text"]
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path}:{number}: no object with a 'text' ({error!r})") from error
        if not isinstance(text, str) or not isinstance(title, str):
            raise DataError(f"{path}:{number}: 'text' and 'title' must be strings")
        part = str(number if part is None else part)
        if part in lines:
            raise DataError(
                f"{path}:{number}: id {part!r} is that of line {lines[part]} too; ids must be unique"
            )
        lines[part] = number
        yield f":{part}", title, text


def _library(name: str, kind: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(
            f"{kind} files need {name}: pip install 'fedrag-jax[documents]'"
        ) from error


READERS: dict[str, Callable] = {
    ".txt": _text, ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html,
    ".pdf": _pdf, ".jsonl": _json_lines,
}  # fmt: skip
