"""Joins words that are hyphenated at line ends, as in PDF files."""

import re

# A word, a hyphen (soft ones among them), a line or page end, and before the next word.
PARTED = re.compile(
    r"(?<![-\w\u2010])((?:\w+[-\u2010])*\w+)([-\u2010\u00ad])"
    r"[ \t]*\n\n?[ \t]*(?=(\w+(?:[-\u2010]\w+)*))"
)
# "pre- and post-war": the hyphen stands for what comes later.
JOINING = ("and", "or", "und", "oder")


def unhyphenated(text: str) -> str:
    """Returns a text with hyphenated words at line ends joined.

    A hyphen stays if it belongs to the word: if the text elsewhere has the word with the hyphen
    ("well-known") but not without, in words of several hyphens, beside digits, between small letters
    and capitals, and before "and".
    """
    known = {word.lower() for word in re.findall(r"\w+(?:[-\u2010]\w+)*", PARTED.sub(" ", text))}

    def whole(found: re.Match) -> str:
        before, hyphen, after = found.groups()
        joined, hyphened = (before + between + after for between in ("", hyphen))
        if hyphen == "\u00ad" or joined.lower() in known:
            return before
        if hyphened.lower() in known:
            return before + hyphen
        if after.lower() in JOINING:
            return f"{before}{hyphen} "
        alike = joined.isupper() or (after.islower() and not before.isupper())
        return before if alike and joined.isalpha() else before + hyphen

    return PARTED.sub(whole, text)
