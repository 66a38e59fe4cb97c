"""Normal forms of answers, for comparing them."""

import re
import string
import sys
import unicodedata
from functools import cache

# Thai, Lao, Myanmar, Khmer, kana and Han: no space stands between words.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\U00020000-\U0003ffff"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation + "‘’´", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPHS = "\u4e00-\u9fa5"  # those of MLQA's script
_KANA = (
    "\u3005\u3041-\u30ff\uff66-\uff9f"  # hiragana, katakana, their marks, and the repetition mark
)


def normalize_answer(text: str) -> str:
    """SQuAD v1.1's normal form: lower case; no ASCII punctuation, English articles or extra spaces.

    Punctuation of other scripts stays, so scores are stricter in other languages than in English.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalize_trivia(text: str) -> str:
    """TriviaQA's normal form (triviaqa_evaluation.py): as SQuAD's, but a space for each punctuation
    mark, among them typographic apostrophes: "Spider-Man" is "spider man"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACED)).split())


def normalize_chinese(text: str) -> str:
    """MLQA's normal form of Chinese (mlqa_evaluation_v1.py): lower case, no punctuation of any script,
    each ideograph a separate word, other words separated by spaces."""
    return _by_character(text, f"([{_IDEOGRAPHS}])")


def normalize_japanese(text: str) -> str:
    """As for Chinese; each kana and each ideograph of Unicode's main block is a separate word.

    MLQA has no Japanese. Japanese words are not separated by spaces either.
    """
    return _by_character(text, f"([\u4e00-\u9fff{_KANA}])")


def comparable(text: str) -> str:
    """The normal form; if it is empty, as for "A" and "the", the text itself in lower case.

    Equal texts have equal forms. Scores use only the normal form, as in SQuAD.
    """
    return normalize_answer(text) or text.strip().lower()


def stands_in(answer: str, text: str) -> bool:
    """Returns whether a text contains an answer literally, as whole words.

    A script without spaces does not show where words end, so there an answer may end anywhere.
    """
    answer = answer.strip()
    if answer not in text:
        return False
    spaced = rf"[^\W{UNSPACED}]"  # a character of a word in other scripts
    before = "" if re.match(f"[{UNSPACED}]", answer) else f"(?<!{spaced})"
    after = "" if re.search(rf"[{UNSPACED}]\Z", answer) else f"(?!{spaced})"
    return bool(re.search(before + re.escape(answer) + after, text))


def _by_character(text: str, alone: str) -> str:
    return " ".join(re.sub(alone, r" \1 ", text.lower().translate(_all_punctuation())).split())


@cache
def _all_punctuation() -> dict[int, None]:
    """Deletes Unicode's punctuation and ASCII's, of which some are symbols to Unicode."""
    punctuation = (i for i in range(sys.maxunicode) if unicodedata.category(chr(i))[0] == "P")
    return dict.fromkeys(punctuation) | dict.fromkeys(map(ord, string.punctuation))
