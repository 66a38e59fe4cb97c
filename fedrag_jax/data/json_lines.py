"""Reads files of JSON lines, plain or gzipped; errors name the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fedrag_jax.data.examples import require_whole
from fedrag_jax.errors import DataError


def jsonl_file(stem: str) -> Path | None:
    """Returns STEM.jsonl or STEM.jsonl.gz, or None if neither exists."""
    return next((p for p in (Path(f"{stem}.jsonl"), Path(f"{stem}.jsonl.gz")) if p.is_file()), None)


def json_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """Yields (object, "file:line") for each line that is not blank.

    Raises:
      DataError: a file that cannot be read, or a line that is not a JSON object or contains half a
        character, with file and line.
    """
    line = 0
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if not text.strip():
                    continue
                where = f"{path}:{line}"
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not JSON ({error.msg}): {text[:60]!r}") from error
                except RecursionError as error:
                    raise DataError(f"{where}: nested too deeply: {text[:60]!r}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{where}: not a JSON object: {text[:60]!r}")
                if "\\u" in text:  # nothing else can spell half a character
                    for field, value in row.items():
                        told = json.dumps([field, value], ensure_ascii=False)
                        require_whole(told, f"{where}: {field!r}")
                yield row, where
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}): {raw[:60]!r}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {line}: {error}") from error


def string_of(row: dict, field: str, where: str, default: str | None = None) -> str:
    """Returns a string field; without a default it is required and must not be blank."""
    value = field_of(row, field, where, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise DataError(f"{where}: {field!r} must be a non-empty string, got {value!r}")
    return value


def strings_of(row: dict, field: str, where: str, default: list | None = None) -> tuple[str, ...]:
    """Returns a field with a list of strings; without a default it is required."""
    value = field_of(row, field, where, default)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: {field!r} must be a list of strings, got {value!r}")
    return tuple(value)


def question_id(row: dict, where: str) -> str:
    """Returns the id of a question; without one, its line, which does not depend on the file's path."""
    if row.get("id") is None:
        return f"line {where.rpartition(':')[2]}"
    return string_of(row, "id", where)


def answers_of(row: dict, where: str) -> tuple[str, ...]:
    """Returns `answers`, at least one of them with words; none if `"unanswerable": true`."""
    marked = row.get("unanswerable") or False
    if not isinstance(marked, bool):
        raise DataError(f"{where}: 'unanswerable' must be true or false, got {marked!r}")
    answers = strings_of(row, "answers", where, default=[] if marked else None)
    has = any(answer.strip() for answer in answers)
    if marked and has:
        raise DataError(f"{where}: is marked unanswerable and has answers {[*answers]}: choose one")
    if not marked and not has:
        name = row.get("id") or row.get("question")
        raise DataError(
            f"{where}: question {name!r} has no answer; give at least one, leave it out, or "
            'mark it "unanswerable": true to have it measured'
        )
    return () if marked else answers


def field_of(row: dict, field: str, where: str, default):
    """Returns any field; without a default it is required and must not be null."""
    value = row.get(field)
    if value is not None:
        return value
    if default is not None:
        return default
    if field in row:
        raise DataError(f"{where}: {field!r} is null; give it a value, or leave the line out")
    raise DataError(f"{where}: missing field {field!r}; found {', '.join(row) or 'none'}")
