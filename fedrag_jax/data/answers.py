"""When two answers are the same."""

import re
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """SQuAD v1.1's normal form: lower case; no ASCII punctuation, English articles, spare spaces.

    Other scripts' punctuation stays, so scores of other languages are stricter than of English.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
