"""A RAG system as an MCP (Model Context Protocol) server with the tools `retrieve` and `ask`.

pip install 'fedrag-jax[mcp]'
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import anyio
from pydantic import BaseModel, Field

import fedrag_jax
from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, FedragError, missing
from fedrag_jax.generation.inference import MODES, SEARCH
from fedrag_jax.rag import RAGSystem
from fedrag_jax.server.address import listening

try:
    import uvicorn
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations
except ImportError as error:
    raise missing("serving MCP needs the package mcp, 2 or newer", "mcp") from error

TRANSPORTS = ("stdio", "http")
MOST_PASSAGES = 100
MOST_CHARACTERS = 8192  # of a question
SEARCHES = 4  # at a time; answers are written one after another
GRACE_S = 5  # for answers under way when the server is told to end

Question = Annotated[
    str, Field(description="In plain words, not blank.", max_length=MOST_CHARACTERS)
]
Count = Annotated[int, Field(description="Passages to find.", ge=1, le=MOST_PASSAGES)]

Mode = Annotated[
    Literal[(*MODES, SEARCH)],
    Field(
        description="How passages are combined into one answer; with 'search' the model searches "
        "while it writes."
    ),
]


class FoundPassage(BaseModel):
    """A passage; a higher score means a better match to the question."""

    id: str
    title: str
    text: str
    topic: str
    score: float


class Retrieved(BaseModel):
    """Passages, best first."""

    passages: list[FoundPassage]


class Searched(BaseModel):
    """A search query and the ids of the passages it found."""

    query: str
    sources: list[str]


class Answered(BaseModel):
    """An answer, its source passages, the ids of the cited passages, and the searches made while
    writing."""

    answer: str
    sources: list[FoundPassage]
    citations: list[str]
    searches: list[Searched] = []


def mcp_server(system: RAGSystem, name: str = "fedrag") -> MCPServer:
    """A server with the tools `retrieve(question, k)` and `ask(question, mode)`.

    The fields "passages" and "sources" of the structured content hold passages with id, title,
    text, topic and score; citations are ids. A failure is a tool error whose text is the reason.
    """
    server = MCPServer(name, version=fedrag_jax.__version__, log_level="WARNING")
    searching, writing = anyio.CapacityLimiter(SEARCHES), anyio.CapacityLimiter(1)
    top_k = min(system.top_k, MOST_PASSAGES)
    hints = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)

    @server.tool(annotations=hints)
    async def retrieve(question: Question, k: Count = top_k) -> Retrieved:
        """Finds the passages that best match a question."""
        (found,) = await _in_thread(searching, system.retrieve, [question], k)
        return Retrieved(passages=_passages(found))

    @server.tool(annotations=hints)
    async def ask(question: Question, mode: Mode = "concatenated") -> Answered:
        """Answers a question from its best-matching passages, or by searching while writing
        (search)."""
        response = await _in_thread(writing, functools.partial(system.query, question, mode=mode))
        return Answered(
            answer=response.answer,
            sources=_passages(response.found),
            citations=[passage.id for passage in response.cited],
            searches=[
                Searched(query=query, sources=[p.id for p in passages])
                for query, passages in response.searches
            ],
        )

    return server


def run(
    system: RAGSystem, transport: str = "stdio", host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serves until the client disconnects (stdio) or the process receives a signal to stop (http).

    Over stdio, standard output belongs to the protocol, and other output goes to standard error. Over
    HTTP, the address (http://host:port/mcp) is printed to standard error. There is no authentication:
    anyone who can reach the port can ask questions.

    Args:
      port: the port; 0 for any free one.

    Raises:
      ConfigError: an unknown transport, or an address that is not available.
    """
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport must be one of {TRANSPORTS}, got {transport!r}")
    server = mcp_server(system)
    if transport == "stdio":
        server.run("stdio")
        return
    with listening(host, port) as (listener, address):
        # No sessions: a client need not know that the server was started anew.
        app = server.streamable_http_app(host=host, stateless_http=True)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S)
        print(f"serving MCP at {address}/mcp", file=sys.stderr, flush=True)
        uvicorn.Server(settings).run(sockets=[listener])


async def _in_thread(limiter: anyio.CapacityLimiter, work: Callable, *arguments) -> Any:
    try:
        return await anyio.to_thread.run_sync(work, *arguments, limiter=limiter)
    except FedragError as error:  # said for people; anything else is a fault of ours, and logged
        raise ToolError(str(error)) from error


def _passages(found: Sequence[tuple[Passage, float]]) -> list[FoundPassage]:
    return [
        FoundPassage(id=p.id, title=p.title, text=p.text, topic=p.topic, score=score)
        for p, score in found
    ]
