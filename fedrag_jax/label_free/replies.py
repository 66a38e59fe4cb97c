"""An author's replies: requested once, stored in a file, and parsed strictly.

A file is JSON lines. The first line describes the prompt and the author; every other line has one
reply, and its parsed content or the reason why it cannot be parsed. Replies are kept even if the author
fails, and are not requested again.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from fedrag_jax import files
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.author import Author, Request
from fedrag_jax.generation.text import Sampling
from fedrag_jax.label_free.prompts import Ask

AT_ONCE = 64  # requests between two writes


@dataclasses.dataclass(frozen=True)
class Read:
    """A parsed reply: its content by the groups of `Ask.reply`, or the problem with it."""

    said: dict[str, str] | None
    fault: str


def replies(
    author: Author,
    ask: Ask,
    about: Mapping[str, Mapping[str, str]],
    path: pathlib.Path,
    doing: str,
    **sampling,
) -> dict[str, Read]:
    """Returns the author's reply about each item; replies already in the file are not requested again.

    Raises:
      ConfigError: the file has replies of another author, or to another prompt or settings.
    """
    stop = (ask.stop,) if ask.stop else ()
    settings = Sampling(max_new_tokens=ask.max_tokens, stop=stop, **sampling)
    # Without what is as ever: files of before then hold what was asked in the same way.
    usual = Ask._field_defaults
    how = {name: x for name, x in ask._asdict().items() if name not in usual or x != usual[name]}
    asked_how = {"author": author.name, **how, **sampling}
    known = _known(path, asked_how, getattr(author, "fingerprint", None))
    for i, said in about.items():
        if i in known and known[i]["about"] != _hash(said):
            del known[i]
    missing = [i for i in about if i not in known]
    with tqdm(total=len(about), initial=len(about) - len(missing), desc=doing, unit="") as bar:
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            requests = [_request(ask, about[i]) for i in some]
            lines = []
            try:
                for i, reply in zip(some, author(requests, settings), strict=True):
                    line = {"id": i, "about": _hash(about[i]), "reply": reply.text}
                    said = ask.read(reply.text) if reply.finished else None
                    fault = "unparsable" if reply.finished else "unfinished"
                    lines.append(line | (said or {"fault": fault}))
                    known[i] = lines[-1]
            finally:  # what came before an author failed is kept
                _append(path, lines)
            bar.update(len(some))
    return {i: _read_line(known[i]) for i in about}


def _read_line(line: dict[str, Any]) -> Read:
    said = {n: x for n, x in line.items() if n not in ("id", "about", "reply", "fault")}
    return Read(said or None, line.get("fault", ""))


def _request(ask: Ask, parts: Mapping[str, str]) -> Request:
    """Returns a prompt about some parts; what follows its text is never truncated."""
    user, ending = _filled(ask.user, parts), _filled(ask.user.rpartition("{text}")[2], parts)
    return Request(ask.system, user, ask.start, ask.chat, ending)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Fills a template; `str.format` would interpret braces in a text."""
    return re.sub(r"{(\w+)}", lambda found: parts.get(found[1], found[0]), template)


def _hash(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _known(
    path: pathlib.Path, asked_how: dict[str, Any], fingerprint: str | None
) -> dict[str, dict[str, Any]]:
    """Returns the lines of a file by id, without the first; creates a new file if absent."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [{"asked": asked_how, "fingerprint": fingerprint}])
        return {}
    lines = []
    text = path.read_bytes().decode("utf-8", "ignore")
    for line in text.removesuffix("\n").split("\n"):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the end of a file whose writer was killed
    # Files of before have no fingerprint.
    told = lines[0] if lines else {}
    if told.get("asked") != asked_how or told.get("fingerprint", fingerprint) != fingerprint:
        raise ConfigError(
            f"{path} holds replies to other requests (another generator, prompt or setting); use "
            "another folder, or delete it"
        )
    if not text.endswith("\n"):
        write_lines(path, lines)
    return {line["id"]: line for line in lines[1:]}


def write_lines(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines atomically."""
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _append(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    with files.writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
