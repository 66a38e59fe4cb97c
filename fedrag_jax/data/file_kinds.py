"""Text, Markdown, HTML, PDF and JSON lines as documents, by the endings of file names.

pip install 'fedrag-jax[documents]' for Markdown, HTML and PDF
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator

from fedrag_jax.data.decoding import decoded
from fedrag_jax.data.examples import require_whole
from fedrag_jax.data.hyphens import unhyphenated
from fedrag_jax.errors import DataError, missing


@dataclasses.dataclass(frozen=True)
class Document:
    """The text of a document.

    Attributes:
      id: path within the folder, with "/"; for a line of a JSON lines file, its own id, or the path and
        the line number.
      named: whether the document has its own id.
      unread: the part that could not be read; "" for none.
    """

    id: str
    title: str
    text: str
    named: bool = False
    unread: str = ""


def _text(path: pathlib.Path, name: str) -> Iterator[Document]:
    yield Document(name, "", decoded(path))


# --- HTML and Markdown -----------------------------------------------------------------------------


def _html(path: pathlib.Path, name: str) -> Iterator[Document]:
    yield Document(name, *_of_html(decoded(path), "HTML"))


def _markdown(path: pathlib.Path, name: str) -> Iterator[Document]:
    parser = _library("markdown_it", "Markdown").MarkdownIt("commonmark").enable("table")
    yield Document(name, *_of_html(parser.render(decoded(path)), "Markdown"))


# Elements that browsers put on lines of their own (HTML Standard, 15.3), and those in lines that they
# put apart.
BLOCKS = ("p", "div", "pre", "table", "section", "article", "ul", "ol", "h1", "h2", "h3", "h4", "h5",
          "h6", "blockquote", "header", "footer", "main", "aside", "address", "hgroup", "search",
          "figure", "figcaption", "dl", "details", "summary", "dialog", "form", "fieldset", "hr",
          "menu", "center")  # fmt: skip
ROWS = ("li", "tr", "br", "dt", "dd", "caption", "legend", "optgroup", "option")
CELLS = ("td", "th", "button", "label")


def _of_html(html: str, kind: str) -> tuple[str, str]:
    bs4 = _library("bs4", kind)
    soup = bs4.BeautifulSoup(html, "html.parser")
    # An icon has a title of its own, perhaps before that of the page.
    titles = [element for element in soup("title") if not element.find_parent("svg")]
    texts = (" ".join(heading.get_text(" ").split()) for heading in [*titles[:1], *soup("h1")[:1]])
    title = next(filter(None, texts), "")
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
    for cell in soup([*CELLS]):
        cell.insert_before(" ")
        cell.insert_after(" ")
    lines = [" ".join(line.split()) for line in soup.get_text("").splitlines()]
    return title, "\n".join(
        line for i, line in enumerate(lines) if line or (i and lines[i - 1])
    ).strip()


# --- PDF -------------------------------------------------------------------------------------------


# What programs call a document that its author has not named.
UNTITLED = ("untitled", "(anonymous)", "unknown", "none")


def _pdf(path: pathlib.Path, name: str) -> Iterator[Document]:
    pypdf = _library("pypdf", "PDF")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what cannot be read is told once
    try:
        reader = pypdf.PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
    except pypdf.errors.DependencyError as error:
        raise missing(f"{path}: encrypted PDF files need cryptography", "documents") from error
    if locked:
        raise DataError(f"{path}: is encrypted with a password; save it without one")
    pages = [page.extract_text() for page in reader.pages]
    if not any(map(str.strip, pages)):
        raise DataError(
            f"{path}: has no text, perhaps only pictures of pages: run text recognition (OCR) first"
        )
    pictures = [
        str(number)
        for number, (page, text) in enumerate(zip(reader.pages, pages, strict=True), start=1)
        if not text.strip() and _shows_a_picture(page)
    ]
    unread = (
        f"{path}: of its {len(pages)} pages those that are pictures without text are not read: "
        f"{', '.join(pictures)}; recognise them first"
    )
    title = str((reader.metadata or {}).get("/Title") or "").strip()
    title = "" if title.lower() in UNTITLED else title
    text = unhyphenated("\n\n".join(pages))
    yield Document(name, title, text, unread=unread if pictures else "")


def _shows_a_picture(page) -> bool:
    """Returns whether a page draws a picture; pages may share a list of pictures they do not draw."""
    contents = page.get_contents()
    operations = () if contents is None else contents.operations
    return any(operator in (b"Do", b"INLINE IMAGE") for _, operator in operations)


# --- JSON lines ------------------------------------------------------------------------------------


def _json_lines(path: pathlib.Path, name: str) -> Iterator[Document]:
    lines: dict[str, int] = {}
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            own, title, text = row.get("id"), row.get("title") or "", row["text"]
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path}:{number}: no object with a 'text' ({error!r})") from error
        if not isinstance(text, str) or not isinstance(title, str):
            raise DataError(
                f"{path}:{number}: 'text' and 'title' must be strings, got {text!r} and {title!r}"
            )
        require_whole(f"{own}{title}{text}", f"{path}:{number}:")
        if own is None:
            yield Document(f"{name}:{number}", title, text)
            continue
        first = lines.setdefault(str(own), number)
        if first != number:
            raise DataError(
                f"{path}:{number}: id {str(own)!r} is that of line {first} too; ids must be unique"
            )
        yield Document(str(own), title, text, named=True)


def _library(name: str, kind: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise missing(f"{kind} files need {name}", "documents") from error


READERS: dict[str, Callable[[pathlib.Path, str], Iterator[Document]]] = {
    ".txt": _text, ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html,
    ".pdf": _pdf, ".jsonl": _json_lines,
}  # fmt: skip
