"""Extracts passages from a tool's answer: structured content or text blocks, in the usual shapes."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedrag_jax.data.examples import Passage, half_character
from fedrag_jax.errors import DataError
from fedrag_jax.retrieval.stores.passage_source import Found

# Where answers have them, the likeliest first; a dot leads into an object.
LISTS = ("passages", "results", "documents", "chunks", "hits", "matches", "items", "nodes", "sources",
         "data", "result")  # fmt: skip
FIELDS = {
    "id": ("id", "_id", "doc_id", "document_id", "passage_id", "chunk_id", "metadata.id", "uri", "url",
           "link", "metadata.source"),
    "title": ("title", "heading", "name", "metadata.title"),
    "text": ("text", "content", "page_content", "passage", "chunk", "body", "snippet", "summary",
             "description"),
    "topic": ("topic", "metadata.topic"),
    "score": ("score", "similarity", "relevance_score", "relevance", "metadata.score"),
}  # fmt: skip


class Shape(NamedTuple):
    """The location of passages in an answer, and the names of their fields.

    Each is a key, or keys joined by dots ("metadata.title"); None for the usual names; "" for none.

    Attributes:
      passages: the list of passages; "" if the answer itself is the list.
      score: the score; higher is better. Passages without a score get 1 / rank; use "" for a tool that
        returns distances.
    """

    passages: str | None = None
    id: str | None = None
    title: str | None = None
    text: str | None = None
    topic: str | None = None
    score: str | None = None


USUAL = Shape()


def read(structured: Any, blocks: Sequence, shape: Shape, whose: str) -> list[Found]:
    """Returns the passages a tool found, best first, without duplicates.

    Args:
      structured: the structured content; None if there is none, and `blocks` are read.
      blocks: content blocks; a text that is a JSON list or object is read like structured content, any
        other text is one passage.
      whose: a name of the answer for error messages.

    Raises:
      DataError: no passages at the expected place, or a passage without a text.
    """
    if structured is not None:
        items = [*_items(structured, shape, whose)]
    else:
        items = [item for block in blocks for item in _of_block(block, shape, whose)]
    return _ranked([_passage(item, shape, whose) for item in items])


def _of_block(block, shape: Shape, whose: str) -> Iterator[Any]:
    if block.type == "text":
        yield from _of_text(block.text, shape, whose)
    elif block.type == "resource" and hasattr(block.resource, "text"):
        if block.resource.text.strip():
            names = [shape.id or "uri", shape.text or "text"]
            yield dict(zip(names, (str(block.resource.uri), block.resource.text), strict=True))
    else:
        raise DataError(
            f"{whose} holds {block.type!r}, which is not text: use a tool that returns text"
        )


def _of_text(text: str, shape: Shape, whose: str) -> Iterator[Any]:
    if text.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            pass  # a text that merely begins so
        else:
            yield from _items(value, shape, whose)
            return
    if text.strip():
        yield text


def _items(value: Any, shape: Shape, whose: str) -> Iterator[Any]:
    """Returns the passages in a parsed JSON value."""
    found = value
    if shape.passages is not None:
        found = _at(value, shape.passages) if shape.passages else value
    else:
        while isinstance(found, dict) and {*found} == {
            "result"
        }:  # how servers wrap what is no object
            found = found["result"]
        if isinstance(found, dict):
            one = [found] if isinstance(_field(found, shape, "text"), str) else None
            found = next((found[k] for k in LISTS if isinstance(found.get(k), list)), one)
    if isinstance(found, str):
        yield from _of_text(found, shape._replace(passages=None), whose)
    elif isinstance(found, list):
        yield from found
    else:
        where = f"at {shape.passages!r}" if shape.passages else f"under any of {', '.join(LISTS)}"
        raise DataError(
            f"{whose} has no list of passages {where}: it is {_told(value)}; say where they are with "
            "shape=Shape(passages=...)"
        )


def _passage(item: Any, shape: Shape, whose: str) -> tuple[Passage, float | None]:
    fields = {"text": item} if isinstance(item, str) else {}
    if isinstance(item, dict):
        fields = {name: _field(item, shape, name) for name in FIELDS}
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        names = shape.text or ", ".join(FIELDS["text"])
        raise DataError(
            f"{whose} has a passage without a text ({names}): it is {_told(item)}; say where the text "
            "is with shape=Shape(text=...)"
        )
    title, topic = (_word(fields.get(name)) for name in ("title", "topic"))
    given = _word(fields.get("id"))
    for told in (given, title, text, topic):
        if fault := half_character(told):
            raise DataError(f"{whose} has a passage that {fault}")
    identifier = given or hashlib.sha256(text.encode()).hexdigest()
    return Passage(identifier, title, text, topic), _number(fields.get("score"))


def _ranked(found: list[tuple[Passage, float | None]]) -> list[Found]:
    seen: set[tuple[str, str]] = set()
    once = []
    for passage, score in found:
        if (passage.id, passage.text) not in seen:
            seen.add((passage.id, passage.text))
            once.append((passage, score))
    if any(score is None for _, score in once):
        return [Found(passage, 1 / rank) for rank, (passage, _) in enumerate(once, start=1)]
    # Stable: of equal scores the tool's order holds.
    return sorted((Found(*each) for each in once), key=lambda f: -f.score)


def _field(item: dict, shape: Shape, name: str) -> Any:
    told = getattr(shape, name)
    paths = FIELDS[name] if told is None else (told,) if told else ()
    return next((v for path in paths if (v := _at(item, path)) not in (None, "")), None)


def _at(value: Any, path: str) -> Any:
    """Returns the value at a path, or None; a key may itself contain dots."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _word(value: Any) -> str:
    """Returns a name or number as text; "" for anything else."""
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value) if plain else ""


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value)) or 'nothing'}"
    return f"{type(value).__name__} {str(value)[:80]!r}"
