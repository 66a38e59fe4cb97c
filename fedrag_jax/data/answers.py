"""When two answers are the same."""

import re
import string
import sys
import unicodedata
from functools import cache

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPHS = "\u4e00-\u9fa5"  # those of MLQA's script
_KANA = (
    "\u3005\u3041-\u30ff\uff66-\uff9f"  # hiragana, katakana, their marks, and the repetition mark
)


def normalize_answer(text: str) -> str:
    """SQuAD v1.1's normal form: lower case; no ASCII punctuation, English articles, spare spaces.

    Other scripts' punctuation stays, so scores of other languages are stricter than of English.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalize_chinese(text: str) -> str:
    """MLQA's normal form of Chinese (mlqa_evaluation_v1.py): lower case, no punctuation of any script,
    each ideograph a word of its own, other words as spaces part them."""
    return _by_character(text, f"([{_IDEOGRAPHS}])")


def normalize_japanese(text: str) -> str:
    """As of Chinese, where each kana and every ideograph of Unicode's main block is a word of its own.

    MLQA has no Japanese; its words are not parted by spaces either.
    """
    return _by_character(text, f"([\u4e00-\u9fff{_KANA}])")


def comparable(text: str) -> str:
    """The normal form; where that leaves nothing, as of "A" and "the", the text itself in lower case.

    Equal texts have equal ones. Scores are of the normal form alone, as SQuAD's are.
    """
    return normalize_answer(text) or text.strip().lower()


def stands_in(answer: str, text: str) -> bool:
    """Whether a text has an answer as it is written, not as a part of a word."""
    return bool(re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text))


def _by_character(text: str, alone: str) -> str:
    return " ".join(re.sub(alone, r" \1 ", text.lower().translate(_all_punctuation())).split())


@cache
def _all_punctuation() -> dict[int, None]:
    """Deletes Unicode's punctuation and ASCII's, of which some are symbols to Unicode."""
    punctuation = (i for i in range(sys.maxunicode) if unicodedata.category(chr(i))[0] == "P")
    return dict.fromkeys(punctuation) | dict.fromkeys(map(ord, string.punctuation))
