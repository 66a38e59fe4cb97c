"""What comes through the gate before a SuperLink, and what does not."""

import socket
import ssl
import threading

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from fedrag_jax.errors import ConfigError
from fedrag_jax.integrations.flower.certificates import make_certificates
from fedrag_jax.integrations.flower.gate import open_gate


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """(address of a gate, its port, certificates, requests that came through)."""
    certificates, came = tmp_path_factory.mktemp("certificates"), []
    make_certificates(certificates, ["127.0.0.1"])

    async def answer(request):
        came.append((request.method, request.url.path, request.headers.get("x-node")))
        status = 418 if request.url.path.endswith("teapot") else 200
        return Response(await request.body(), status, {"x-link": "here"})

    link = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", answer, methods=["POST", "GET"])]),
            host="127.0.0.1",
            port=free_port(),
            ssl_certfile=str(certificates / "server.pem"),
            ssl_keyfile=str(certificates / "server.key"),
            log_level="warning",
            ws="none",
        )
    )
    thread = threading.Thread(target=link.run, daemon=True)
    thread.start()
    while thread.is_alive() and not link.started:
        thread.join(0.05)
    port = free_port()
    gate = open_gate(f"127.0.0.1:{link.config.port}", certificates, "127.0.0.1", port)
    yield f"https://127.0.0.1:{port}", port, certificates, came
    gate.should_exit = link.should_exit = True
    thread.join(5)


@pytest.fixture
def client(ways):
    trusted = ssl.create_default_context(cafile=str(ways[2] / "ca.crt"))
    with httpx.Client(base_url=ways[0], verify=trusted) as found:
        yield found


def test_what_nodes_say_passes_as_it_is(ways, client):
    body = bytes(range(256)) * 5000
    answer = client.post("/v1/fleet/push-object", content=body, headers={"X-Node": "7"})
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["x-link"] == "here"
    assert ways[3][-1] == ("POST", "/v1/fleet/push-object", "7")
    assert client.post("/v1/fleet/teapot").status_code == 418


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/pull-messages",
        "/",
        "/v1/fleet",
        "//v1/fleet/x",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//../control",
        "/v1/FLEET/x",
    ],
)
def test_nothing_else_does(ways, path):
    before = len(ways[3])
    trusted = ssl.create_default_context(cafile=str(ways[2] / "ca.crt"))
    # By hand: a client would tidy the path up.
    with (
        socket.create_connection(("127.0.0.1", ways[1])) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        assert tls.recv(100).startswith(b"HTTP/1.1 404")
    assert len(ways[3]) == before


def test_a_taken_port_is_named(ways):
    with pytest.raises(ConfigError, match=f"port {ways[1]} of 127.0.0.1 is not available"):
        open_gate("127.0.0.1:1", ways[2], "127.0.0.1", ways[1])


def test_a_link_that_is_gone_is_said_to_be(ways, client):
    port = free_port()
    gate = open_gate(f"127.0.0.1:{free_port()}", ways[2], "127.0.0.1", port)
    assert client.post(f"https://127.0.0.1:{port}/v1/fleet/x").status_code == 503
    gate.should_exit = True
