"""Serve a system over HTTP, with OpenAI's API, or as an MCP server.

HTTP: POST /v1/chat/completions (whole or streamed), GET /v1/models and /v1/models/ID, GET /health.
If the environment variable FEDRAG_API_KEY is set, callers must send this key. After SIGTERM the server
answers running requests and stops.
"""

import argparse
import contextlib
import os
import sys

from fedrag_jax.cli.common import add_system
from fedrag_jax.server.address import KEY

HOST, PORT = "127.0.0.1", 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag serve`."""
    add_system(parser)
    parser.add_argument("--host", help=f"address to listen on (default: {HOST})")
    parser.add_argument("--port", type=int, help=f"port to listen on (default: {PORT})")
    parser.add_argument("--model", help="model name that callers send (default: fedrag)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may call the server, such as https://example.org, or '*' for "
        "all; may be repeated (default: none)",
    )
    parser.add_argument(
        "--mcp", choices=("stdio", "http"), help="serve the Model Context Protocol instead"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag serve` until it is stopped."""
    from fedrag_jax.errors import ConfigError
    from fedrag_jax.rag import RAGSystem

    if args.mcp and (args.model or args.cors_origin):
        raise ConfigError(
            "--model and --cors-origin apply to the HTTP interface, not to --mcp: leave them out"
        )
    if args.mcp == "stdio" and (args.host is not None or args.port is not None):
        raise ConfigError("--host and --port do not apply to --mcp=stdio: leave them out")
    host, port = args.host or HOST, PORT if args.port is None else args.port
    if args.mcp == "http" and os.environ.get(KEY):
        raise ConfigError(
            f"MCP over HTTP has no authentication, but {KEY} is set: unset it, or use stdio"
        )
    if args.mcp:
        from fedrag_jax.server import mcp_server

        # Over stdio, standard output is the protocol's alone.
        with contextlib.redirect_stdout(sys.stderr):
            system = RAGSystem.load(args.system, elsewhere=args.elsewhere)
        mcp_server.run(system, args.mcp, host, port)
        return 0
    from fedrag_jax.server import http

    system = RAGSystem.load(args.system, elsewhere=args.elsewhere)
    http.serve(system, host, port, args.model or http.MODEL, args.cors_origin)
    return 0
