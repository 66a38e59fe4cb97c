"""A connection to an MCP server, using the protocol's client, for threads without an event loop."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CONNECTION_CLOSED, CallToolResult

LAST_WORDS = 5  # lines of a server's standard error that an error quotes
FAREWELL_S = 10.0  # a server's time to end; a process that takes longer is killed
PAGES = 100  # of a list of tools


class ServerCommand(NamedTuple):
    """A server started by a command, with communication over standard input and output."""

    command: Sequence[str]
    env: Mapping[str, str]


class Address(NamedTuple):
    """A server with communication over HTTP."""

    url: str
    headers: Mapping[str, str]


class LinkLost(Exception):
    """The connection to the server is lost."""


class Link:
    """A client in a separate event loop and thread.

    Attributes:
      tools: the server's tools, by name.
    """

    def __init__(self, server: ServerCommand | Address, timeout: float, at_once: int):
        """Connects; starts the server if it is a program.

        Args:
          timeout: seconds for connecting, and for each answer.
          at_once: maximum number of concurrent calls.

        Raises:
          LinkLost: there is no server, or it does not speak the protocol.
          TimeoutError: the server does not answer in time.
        """
        self._server, self._timeout = server, timeout
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._ending = threading.Lock()
        self._loop = contextlib.ExitStack()
        self._portal = self._loop.enter_context(start_blocking_portal(name="fedrag-mcp"))
        try:
            self._closing, self._places = self._portal.call(_signals, at_once)
            self._held, (self._client, self.tools) = self._portal.start_task(self._hold)
        except BaseException as error:
            self._loop.close()
            if not isinstance(error, Exception):
                raise
            kind = TimeoutError if isinstance(error, TimeoutError) else LinkLost
            raise kind(self._why(error)) from error

    def call(self, tool: str, calls: Sequence[Mapping[str, Any]]) -> list[CallToolResult]:
        """Returns the answers of a tool, one per call.

        Raises:
          LinkLost: the connection was lost.
          TimeoutError: an answer did not arrive in time.
          MCPError: the server refused.
          RuntimeError: an answer that is not what the tool's own description promises.
        """
        try:
            asked = [self._portal.start_task_soon(self._ask, tool, dict(each)) for each in calls]
        except RuntimeError as error:  # closed meanwhile, by another thread
            raise LinkLost("the connection was closed") from error
        try:
            return [each.result() for each in asked]
        except BaseException as error:
            for each in asked:
                each.cancel()
            if isinstance(error, MCPError) and _is_gone(error):
                raise LinkLost(self._why(error)) from error
            raise

    def close(self) -> None:
        """Ends the connection, and the server if this started it."""
        if threading.current_thread().name == "fedrag-mcp":  # a finalizer of the garbage collector
            threading.Thread(target=self.close).start()
            return
        with (
            self._ending,
            contextlib.suppress(RuntimeError),
        ):  # the portal has stopped: closed already
            self._portal.call(self._closing.set)
            try:
                self._held.exception(FAREWELL_S)
            except TimeoutError:
                self._held.cancel()
            self._loop.close()

    # --- in the loop ---------------------------------------------------------------------------

    async def _hold(self, *, task_status) -> None:
        with anyio.fail_after(self._timeout) as scope, self._standard_error() as errors:
            async with self._transport(errors) as transport, Client(transport) as client:
                tools = [tool async for tool in _tools(client)]
                scope.deadline = float("inf")
                errors.close()  # the server has its own end of it
                task_status.started((client, {tool.name: tool for tool in tools}))
                await self._closing.wait()

    @contextlib.asynccontextmanager
    async def _transport(self, errors: TextIO):
        if isinstance(self._server, ServerCommand):
            command, *args = self._server.command
            settings = StdioServerParameters(command=command, args=args, env=dict(self._server.env))
            yield stdio_client(settings, errlog=errors)
        else:
            # No time limit on reading: `timeout` is one, and a stream of notices may long be silent.
            limits = httpx2.Timeout(self._timeout, read=None)
            headers = dict(self._server.headers)
            async with httpx2.AsyncClient(headers=headers, timeout=limits) as http:
                yield streamable_http_client(self._server.url, http_client=http)

    @contextlib.contextmanager
    def _standard_error(self) -> Iterator[TextIO]:
        """The standard error of a started program; its last lines are kept for error messages."""
        read, write = os.pipe()

        def listen():
            with open(read, encoding="utf-8", errors="replace") as lines:
                self._last_words.extend(line.rstrip() for line in lines if line.strip())

        self._listener = threading.Thread(target=listen, daemon=True, name="fedrag-mcp-errors")
        self._listener.start()
        with open(write, "w") as errors:
            yield errors

    async def _ask(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        async with self._places:
            with anyio.fail_after(self._timeout):
                return await self._client.call_tool(tool, arguments)

    def _why(self, error: BaseException) -> str:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._listener.join(1.0)  # the last words of who is dead may be on their way
        said = "".join(f"\n  it said: {line}" for line in self._last_words)
        return f"{str(error) or type(error).__name__}{said}"


async def _signals(at_once: int) -> tuple[anyio.Event, anyio.Semaphore]:
    return anyio.Event(), anyio.Semaphore(at_once)


async def _tools(client: Client):
    cursor = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            yield tool
        if (cursor := page.next_cursor) is None:
            return


def _is_gone(error: MCPError) -> bool:
    # The second: a restarted server no longer knows the connection; servers word that differently.
    return error.code == CONNECTION_CLOSED or "session" in error.message.lower()
