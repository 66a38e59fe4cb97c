"""An MCP server that knows nothing of this package: python foreign_mcp.py [port [old]]."""

import json
import os
import pathlib
import sys
import time

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import EmbeddedResource, TextContent, TextResourceContents

server = MCPServer("foreign", log_level="ERROR")
under_way = most = 0


@server.tool(structured_output=False)
def lookup(query: str, shelf: str = "any") -> list[TextContent]:
    """Three texts, one of them twice, and nothing else told of them."""
    texts = [
        f"{query} is on the {shelf} shelf.",
        "Rome is a city.",
        "Rome is a city.",
        " ",
        "[1] Oslo.",
    ]
    return [TextContent(type="text", text=text) for text in texts]


@server.tool(structured_output=False)
def search_documents(query: str, limit: int) -> str:
    """As LangChain's servers tell it: JSON in a text."""
    found = [
        {
            "page_content": f"{query} {i}",
            "metadata": {"source": f"s{i}", "title": f"T{i}"},
            "score": i / 8,
        }
        for i in range(limit + 2)
    ]
    return json.dumps(found)


@server.tool()
def deep(query: str) -> dict:
    """Structured content under names of its own; nearer is better."""
    near = [
        {"key": 7, "label": "Seven", "prose": {"en": query}, "score": 9},
        {"prose": {"en": "far"}},
    ]
    return {"query": query, "reply": {"rows": near}}


@server.tool(structured_output=False)
def resource(query: str) -> EmbeddedResource:
    """A file."""
    held = TextResourceContents(uri=f"file:///{query}.txt", text=f"The file {query}.")
    return EmbeddedResource(type="resource", resource=held)


@server.tool()
def refuse(query: str) -> str:
    """Does not."""
    raise ToolError(f"no shelf holds {query}")


@server.tool(structured_output=False)
def slow(query: str, seconds: float = 0.05) -> str:
    """Sleeps, and tells how many slept together."""
    global under_way, most
    under_way += 1
    most = max(most, under_way)
    time.sleep(seconds)
    under_way -= 1
    return f"{query} {most}"


@server.tool(structured_output=False)
async def stuck(query: str) -> str:
    """Never answers a question about Ann."""
    await anyio.sleep(3600 if query == "Ann" else 0)
    return query


@server.tool(structured_output=False)
def process(query: str) -> str:
    """Who answers."""
    return str(os.getpid())


@server.tool(structured_output=False)
def fatal(query: str) -> str:
    """Ends the server; where the question is the path of a file, only while that is there."""
    path = pathlib.Path(query)
    if path.is_absolute() and not path.exists():
        return "alive"
    path.unlink(missing_ok=True)
    print("I have had enough", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool(structured_output=False)
def secret(query: str) -> str:
    """What it was given in its environment."""
    return os.environ.get("FOREIGN_KEY", "none")


def of_old(app):
    """A server of a protocol before discovery, which holds sessions: clients fall back to them."""

    async def serve(scope, receive, send):
        headers = dict(scope.get("headers", ()))
        if headers.get(b"mcp-method") == b"server/discover":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    return serve


if __name__ == "__main__":
    if len(sys.argv) > 2:
        app = of_old(server.streamable_http_app())
        uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
    elif len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
