"""A store that calls a tool of any MCP (Model Context Protocol) server, over stdio or HTTP.

pip install 'fedrag-jax[mcp]'
"""

import json
import os
import pathlib
import shlex
import threading
import urllib.parse
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Self

from fedrag_jax.errors import ConfigError, DataError, FedragError, missing
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.mcp_replies import USUAL, Shape, read
from fedrag_jax.retrieval.stores.passage_source import Found, PassageSource, strings

TIMEOUT_S = 60.0
SECRET = "FEDRAG_MCP_"  # what a saved folder does not hold is read from variables that begin so


class MCPStore(PassageSource):
    """Calls one tool of an MCP server, one question per call and many calls at a time; thread-safe.

    The store connects when it is created, and once more if the connection was lost. It can only search:
    the server's passages cannot be changed or listed.
    """

    kind, cosines = "mcp", False

    def __init__(
        self,
        tool: str = "retrieve",
        *,
        command: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        url: str = "",
        headers: Mapping[str, str] | None = None,
        question: str = "question",
        k: str | None = "k",
        arguments: Mapping[str, Any] | None = None,
        shape: Shape = USUAL,
        timeout: float = TIMEOUT_S,
        at_once: int = 8,
    ):
        """Connects to a server; the defaults fit `server.mcp_server`.

        Args:
          tool: name of the tool.
          command: command that starts the server, for communication over standard input and output. It
            is saved with the store; put secrets in `env`.
          env: environment variables of the server, which gets few others (PATH, HOME, ...); not saved.
          url: HTTP address of the server, instead of a command; the part after "?" is not saved.
          headers: headers of each request ({"Authorization": "Bearer ..."}); not saved.
          question: name of the tool's argument for the question.
          k: name of its argument for the number of passages; None if it has none.
          arguments: its other arguments, the same for all questions.
          shape: location of the passages in its answers, if not under the usual names.
          timeout: seconds for the server to start, and for each answer.
          at_once: maximum number of concurrent calls.

        Raises:
          ConfigError: neither command nor url, or both; the package mcp is missing; the server lacks
            the tool or an argument, or requires another argument.
          StoreUnreachable: the server does not answer.
        """
        super().__init__()
        if isinstance(command, str) or bool(command) == bool(url):
            raise ConfigError(
                "an MCP server is either started or called: give command, a list such as "
                f"['python', 'server.py'], or url; got command={command!r} and url={_public(url)!r}"
            )
        address = urllib.parse.urlsplit(url)
        if url and (address.scheme not in ("http", "https") or "@" in address.netloc):
            raise ConfigError(
                f"url must begin with http:// or https:// and name no user, got {_public(url)!r}: give "
                "passwords in headers"
            )
        if not timeout > 0 or at_once < 1:
            raise ConfigError(f"timeout must be > 0 and at_once >= 1, got {timeout} and {at_once}")
        if (headers and not url) or (env and not command):
            raise ConfigError("headers go with url, and env with command")
        try:
            json.dumps(arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"arguments must be JSON, got {arguments!r}: {error}") from error
        self.tool, self.command, self.url = tool, [*command], url
        self.question, self.k, self.arguments = question, k, dict(arguments or {})
        self.shape, self.timeout, self.at_once = shape, timeout, at_once
        self._env, self._headers = dict(env or {}), dict(headers or {})
        self._linking, self._link, self._closed = threading.Lock(), None, False
        self._linked()
        try:
            self._check_tool()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and the server if it was started here."""
        with self._linking:
            self._closed = True
            self._drop()

    def search(self, questions: Sequence[str], vectors=None, k: int = 5) -> list[list[Found]]:
        """Returns the k passages that the tool finds for each question, best first, or fewer.

        Args:
          vectors: ignored.

        Raises:
          ConfigError: k below 1, or the store is closed.
          StoreUnreachable: the connection is lost and cannot be restored, a timeout, or a refusal.
          DataError: an answer without passages.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        questions = strings(questions, "questions")
        number = {} if self.k is None else {self.k: k}
        calls = [self.arguments | number | {self.question: q} for q in questions]
        found = []
        for question, answer in zip(questions, self._call(calls), strict=True):
            whose = f"the answer of {self._name} to {question[:80]!r}"
            if answer.is_error:
                said = " ".join(block.text for block in answer.content if block.type == "text")
                raise StoreUnreachable(
                    f"{whose} is an error: {said[:500] or 'it does not say which'}"
                )
            found.append(read(answer.structured_content, answer.content, self.shape, whose)[:k])
        return found

    # --- the connection ------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.place(self._settings())

    def _call(self, calls: Sequence[dict[str, Any]]) -> list:
        from fedrag_jax.retrieval.stores.mcp_link import LinkLost, MCPError

        link = self._linked()
        try:
            try:
                return link.call(self.tool, calls)
            except LinkLost:
                return self._linked(link).call(self.tool, calls)
        except FedragError:
            raise
        except LinkLost as error:
            raise StoreUnreachable(f"{self._name} went away: {error}; is it running?") from error
        except TimeoutError as error:
            raise StoreUnreachable(
                f"{self._name} gave no answer within {self.timeout:g} s: give it more with timeout="
            ) from error
        except MCPError as error:
            raise StoreUnreachable(f"{self._name} refused: {error}") from error
        except (RuntimeError, ValueError) as error:  # of the client, which checks what it is told
            raise DataError(f"{self._name} answers otherwise than it promised: {error}") from error

    def _linked(self, former=None):
        """Returns the connection; a new one if the former is lost."""
        mcp_link = _library()
        with self._linking:
            if self._closed:
                raise ConfigError(f"the store that asks {self._name} is closed: make a new one")
            if self._link is former:
                self._drop()
            if self._link is None:
                server = mcp_link.Address(self.url, self._headers)
                if self.command:
                    server = mcp_link.ServerCommand(self.command, self._env)
                try:
                    self._link = mcp_link.Link(server, self.timeout, self.at_once)
                except mcp_link.LinkLost as error:
                    raise StoreUnreachable(
                        f"{self._name} does not answer: {error}; "
                        + ("does the command run?" if self.command else "is it running?")
                    ) from error
                except TimeoutError as error:
                    raise StoreUnreachable(
                        f"{self._name} was not there within {self.timeout:g} s: give it more with "
                        f"timeout= ({error})"
                    ) from error
                # Also when nobody closes the store: no server outlives it.
                self._farewell = weakref.finalize(self, self._link.close)
            return self._link

    def _drop(self) -> None:
        if self._link is not None:
            self._farewell()
            self._link = None

    def _check_tool(self) -> None:
        tools = self._link.tools
        if self.tool not in tools:
            raise ConfigError(
                f"{self._name}: there is no such tool, but {', '.join(sorted(tools)) or 'none at all'}"
            )
        schema = tools[self.tool].input_schema
        taken, given = schema.get("properties", {}), {self.question, *self.arguments}
        given |= {self.k} - {None}
        unknown, missing = given - {*taken}, {*schema.get("required", ())} - given
        if missing or (taken and unknown and not schema.get("additionalProperties")):
            raise ConfigError(
                f"{self._name} takes the arguments {', '.join(taken) or '(none)'}; "
                + (f"it requires {min(missing)!r}" if missing else f"there is no {min(unknown)!r}")
                + ": set question=, k= (None for no number) and arguments="
            )

    # --- on disk -------------------------------------------------------------------------------

    @classmethod
    def lies_elsewhere(cls, settings: dict[str, Any]) -> bool:
        """Always."""
        return True

    @classmethod
    def place(cls, settings: dict[str, Any]) -> str:
        """The tool, and its server's address or the command that starts it."""
        if command := settings["command"]:
            return (
                f"tool {settings['tool']!r} of the MCP server that {shlex.join(command)!r} starts"
            )
        return f"tool {settings['tool']!r} of the MCP server at {_public(settings['url'])}"

    def _settings(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "command": self.command,
            "env": sorted(self._env),
            "url": _public(self.url),
            "query": "?" in self.url,
            "headers": sorted(self._headers),
            "question": self.question,
            "k": self.k,
            "arguments": self.arguments,
            "shape": self.shape._asdict(),
            "timeout": self.timeout,
            "at_once": self.at_once,
        }

    def _save(self, folder: pathlib.Path) -> None:
        """Nothing: the passages are the server's."""

    @classmethod
    def _load(cls, folder: pathlib.Path, settings: dict[str, Any], memory_map: bool) -> Self:
        """Opens the store; secrets come from environment variables FEDRAG_MCP_ plus the name of
        each."""
        place, settings = cls.place(settings), dict(settings)
        for secrets in ("env", "headers"):
            settings[secrets] = {name: _secret(name, place) for name in settings[secrets]}
        if settings.pop("query"):
            settings["url"] += "?" + _secret("query", place)
        return cls(**settings | {"shape": Shape(**settings["shape"])})


def _secret(name: str, place: str) -> str:
    variable = SECRET + name.upper().replace("-", "_")
    if variable not in os.environ:
        raise ConfigError(
            f"{place} needs {name!r}, which was not saved: set {variable}, or make an MCPStore with it "
            "and give it to RAGSystem.over"
        )
    return os.environ[variable]


def _public(url: str) -> str:
    """Returns an address without user, password and query, which may be secrets."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _library():
    try:
        from fedrag_jax.retrieval.stores import mcp_link
    except ImportError as error:
        raise missing("asking an MCP server needs the package mcp, 2 or newer", "mcp") from error
    return mcp_link
