"""An HTTP API like OpenAI's for a system: chat completions, whole or streamed, models, health.

pip install 'fedrag-jax[serve]'
"""

import contextlib
import hmac
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fedrag_jax.errors import ConfigError, DataError, FedragError, missing
from fedrag_jax.generation.inference import Lookup, Response
from fedrag_jax.rag import RAGSystem
from fedrag_jax.server.address import KEY, listening
from fedrag_jax.server.answering import Answering, Written
from fedrag_jax.server.chat_requests import RequestError, read_body, require_model, understood

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise missing(f"serving over HTTP needs {error.name}", "serve") from error

MODEL = "fedrag"
GRACE_S = 60  # for answers under way when the server is told to end


def application(
    system: RAGSystem, model: str = MODEL, cors_origins: Sequence[str] = ()
) -> Starlette:
    """An ASGI application: POST /v1/chat/completions, GET /v1/models and /v1/models/ID, GET /health.

    The last user message is the question; all system messages together are the system prompt.
    Earlier turns are ignored. In addition to OpenAI's fields, an answer has `fedrag`: its sources with
    their scores, and the ids of the cited ones. If the environment variable FEDRAG_API_KEY is set,
    callers must send this key.

    Args:
      model: the model name that callers send.
      cors_origins: origins of web pages that may call the API, such as "https://example.org"; "*" for
        all.

    Raises:
      ConfigError: an invalid origin.
    """
    middleware = [_cors(cors_origins)] if cors_origins else []
    answering, key = Answering(system), os.environ.get(KEY, "")

    @contextlib.asynccontextmanager
    async def running(app):
        async with answering.running():
            yield

    async def health(request: Request):
        return JSONResponse({"status": "ok", "model": model})

    async def models(request: Request):
        _authorised(request, key)
        return JSONResponse({"object": "list", "data": [_model(model)]})

    async def one_model(request: Request):
        _authorised(request, key)
        require_model(request.path_params["name"], model)
        return JSONResponse(_model(model))

    async def chat(request: Request):
        _authorised(request, key)
        body = await read_body(request.stream())
        question, system_prompt, how = understood(body, model)
        told = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        if body.get("stream"):
            # Begun here: what cannot be answered is refused, and not broken off.
            written = await answering.stream(question, system_prompt, **how)
            counted = (body.get("stream_options") or {}).get("include_usage", False)
            events = _events(written, told, counted)
            return StreamingResponse(events, media_type="text/event-stream")
        response = await answering.query(question, system_prompt, **how)
        return JSONResponse(told | _whole(response))

    async def refused(request: Request, error: Exception):
        status = 400 if isinstance(error, ConfigError | DataError) else 503
        param = code = None
        if isinstance(error, RequestError):
            status, param, code = error.status, error.param, error.code
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        told = {"message": str(error), "type": kind, "param": param, "code": code}
        return JSONResponse({"error": told}, status_code=status)

    async def unknown(request: Request, error: HTTPException):
        there = f"{request.method} {request.url.path}"
        wrong = RequestError(error.status_code, f"{error.detail}: {there} is not served")
        return await refused(request, wrong)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        lifespan=running,
        exception_handlers={
            RequestError: refused,
            FedragError: refused,
            HTTPException: unknown,
        },
        middleware=middleware,
    )


def _cors(origins: Sequence[str]) -> Middleware:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/?#@]+", origin):
            raise ConfigError(
                "a CORS origin must be '*' or only scheme, host and port, such as "
                f"'https://example.org', got {origin!r}"
            )
    return Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fedrag"}


def _authorised(request: Request, key: str) -> None:
    given = re.sub("^bearer +", "", request.headers.get("authorization", ""), flags=re.I)
    # Headers are read as Latin-1, whatever their bytes are.
    if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
        raise RequestError(
            401, "missing or wrong API key: send it as 'Authorization: Bearer <key>'"
        )


def _usage(tokens: tuple[int, int]) -> dict[str, int]:
    read, written = tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def _whole(response: Response) -> dict[str, Any]:
    message = {"role": "assistant", "content": response.answer, "refusal": None}
    return {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": None,
                "finish_reason": _reason(response.finish),
            }
        ],
        "usage": _usage(response.tokens),
        "fedrag": _grounds(response),
    }


def _reason(finish: str) -> str:
    """OpenAI's finish reason; OpenAI has none for a text that began to repeat itself."""
    return "stop" if finish == "repetition" else finish


def _grounds(response: Response) -> dict[str, Any]:
    """The sources and citations of an answer."""
    searches = {"searches": [_search(one) for one in response.searches]}
    return {
        "sources": [
            {"id": p.id, "title": p.title, "text": p.text, "score": score}
            for p, score in response.found
        ],
        "cited": [p.id for p in response.cited],
    } | (searches if response.searches else {})


def _search(lookup: Lookup) -> dict[str, Any]:
    return {"query": lookup.query, "sources": [p.id for p in lookup.passages]}


async def _events(written: Written, told: dict[str, Any], counted: bool):
    """Yields the server-sent events of an answer; the last choice has its sources.

    Args:
      counted: whether a last event without choices gives the token counts (`null` in earlier events).
    """
    usage = {"usage": None} if counted else {}

    def chunk(choices, **more) -> str:
        about = {"object": "chat.completion.chunk", "choices": choices}
        return f"data: {json.dumps(told | about | usage | more)}\n\n"

    def event(delta, finish=None, **more) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return chunk([choice], **more)

    async with contextlib.aclosing(written.pieces) as pieces:
        yield event({"role": "assistant", "content": ""})
        try:
            async for piece in pieces:
                if isinstance(piece, str):
                    yield event({"content": piece})
                else:
                    yield event({}, fedrag={"search": _search(piece)})
        except FedragError as error:
            yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"
            return
        response = written.response()
        yield event({}, _reason(response.finish), fedrag=_grounds(response))
        if counted:
            yield chunk([], usage=_usage(response.tokens))
        yield "data: [DONE]\n\n"


def serve(
    system: RAGSystem,
    host: str,
    port: int,
    model: str = MODEL,
    cors_origins: Sequence[str] = (),
) -> None:
    """Serves until SIGINT or SIGTERM; running requests are answered first.

    Args:
      port: the port; 0 for any free one. The address is printed to standard error.
      model, cors_origins: as in `application`.

    Raises:
      ConfigError: the address is not available, or an origin is invalid.
    """
    app = application(system, model, cors_origins)
    with listening(host, port) as (listener, address):
        settings = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=GRACE_S)
        print(f"serving {model} at {address}/v1", file=sys.stderr, flush=True)
        uvicorn.Server(settings).run(sockets=[listener])
