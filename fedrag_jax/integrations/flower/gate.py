"""A reverse proxy in front of a SuperLink that passes only requests of nodes.

A SuperLink has three interfaces on one port: for nodes (`/v1/fleet/`), for users who start runs
(`/v1/control/`) and for the apps that it runs (`/v1/runtime/`). Without an account server, the second
accepts an app from anyone and makes all parties run it. So the SuperLink listens only on loopback, and
this gate, with the same certificate, passes on only the first interface.
"""

import pathlib
import socket
import ssl
import threading

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedrag_jax.errors import ConfigError
from fedrag_jax.integrations.flower.certificates import CA, CERTIFICATE, KEY

PASSED = "/v1/fleet/"
HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host"}
PATIENCE = 600.0  # seconds for an answer, which may be a large model


def gate(link: str, certificates: pathlib.Path) -> Starlette:
    """Returns the application of a gate in front of a SuperLink.

    Args:
      link: `host:port` of the SuperLink.
      certificates: folder that `make_certificates` wrote.
    """
    trusted = ssl.create_default_context(cafile=str(certificates / CA))
    client = httpx.AsyncClient(base_url=f"https://{link}", verify=trusted, timeout=PATIENCE)

    async def passed(request: Request) -> Response:
        path = request.scope["raw_path"].decode("ascii")
        if not path.startswith(PASSED) or ".." in path or "%" in path or "//" in path:
            return PlainTextResponse("not here", 404)
        headers = [(n, v) for n, v in request.headers.raw if n.decode().lower() not in HOP]
        # Piece by piece: the gate holds nothing of what anyone may send it.
        asked = client.build_request(
            request.method, path, headers=headers, content=request.stream()
        )
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink does not answer", 503)
        told = {n: v for n, v in answer.headers.items() if n.lower() not in HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, told, background=_Closing(answer)
        )

    return Starlette(routes=[Route("/{path:path}", passed, methods=["POST", "GET"])])


class _Closing:
    """Closes an answer after it was passed on."""

    def __init__(self, answer: httpx.Response):
        self.answer = answer

    async def __call__(self) -> None:
        await self.answer.aclose()


def open_gate(link: str, certificates: pathlib.Path, host: str, port: int) -> uvicorn.Server:
    """Starts a gate in a separate thread; `should_exit` ends it.

    Raises:
      ConfigError: the address or port is not available.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} is not available ({error.strerror}): end the program that listens "
            "there, or make a federation with another --port"
        ) from error
    config = uvicorn.Config(
        gate(link, certificates),
        ssl_certfile=str(certificates / CERTIFICATE),
        ssl_keyfile=str(certificates / KEY),
        log_level="warning",
        access_log=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    return server
