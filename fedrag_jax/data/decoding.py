"""Decodes text files in UTF-8, UTF-16 and UTF-32, with and without a byte order mark."""

import codecs
import pathlib
import re
import unicodedata

from fedrag_jax.errors import DataError

MARKS = {  # those of UTF-32 first: a mark of UTF-16 begins one of them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
# No text has these, but the letters of UTF-16 and UTF-32 have them in between if read as UTF-8.
GAPS = re.compile("[\0-\x06\x0e-\x1a]")
MOST_GAPS = 0.02  # of the characters, that a text may have all the same


def decoded(path: pathlib.Path) -> str:
    """Returns the text of a file.

    Without a byte order mark the encoding is UTF-8, unless the result has gaps between the letters.
    Then it is UTF-16 or UTF-32, whichever gives a valid text.

    Raises:
      DataError: the encoding is none of these, or it cannot be determined.
    """
    data = path.read_bytes()
    encoding = next((e for mark, e in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text, fault = data.decode(encoding), None
    except UnicodeDecodeError as error:
        text, fault = None, error
    if text is not None and len(GAPS.findall(text)) <= MOST_GAPS * len(text):
        return text
    if encoding == "utf-8-sig" and (wide := _wide(data)):
        return wide
    if fault:
        raise DataError(f"{path}: byte {fault.start} is not {encoding}; save the file as UTF-8")
    raise DataError(
        f"{path}: has control characters between its letters, so it is no {encoding}, and perhaps "
        "another encoding or no text; save the file as UTF-8"
    )


def _wide(data: bytes) -> str:
    """The reading in UTF-16 or UTF-32 that has the most ASCII characters; "" if no one is a text.

    Text has spaces, line ends or digits in any script, and they are ASCII in the right reading alone.
    """
    texts = []
    for encoding in WIDE if b"\0" in data else ():
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not GAPS.search(text) and all(unicodedata.category(c) != "Cn" for c in {*text}):
            texts.append((sum(c.isascii() for c in text), text))
    count, best = max(texts, default=(0, ""))
    return best if count else ""
