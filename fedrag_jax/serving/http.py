"""A system behind an HTTP interface like OpenAI's: chat completions, whole or streamed, and health.

pip install 'fedrag-jax[serve]'
"""

import contextlib
import hmac
import json
import os
import sys
import time
import uuid
from typing import Any

from fedrag_jax.errors import ConfigError, DataError, FedragError
from fedrag_jax.inference import Response
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.source import Found
from fedrag_jax.serving.address import KEY, listening
from fedrag_jax.serving.answering import Answering, Written

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ConfigError(
        f"serving over HTTP needs {error.name}: pip install 'fedrag-jax[serve]'"
    ) from error

MODEL = "fedrag"
MOST_BYTES = 16 << 20  # of a request
GRACE_S = 60  # for answers under way when the server is told to end
# Of the interface: what changes an answer is honoured or refused, what does not is let pass.
HONOURED = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
            "temperature", "top_p", "seed", "stop", "mode", "beams"}  # fmt: skip
PASSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
          "parallel_tool_calls"}  # fmt: skip
NEUTRAL = {"n": (1,), "logprobs": (False,), "frequency_penalty": (0,), "presence_penalty": (0,),
           "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
           "response_format": ({"type": "text"},), "modalities": (["text"],)}  # fmt: skip


class RequestError(Exception):
    """A request that is answered with an error of the interface.

    Attributes:
      status: of HTTP.
      param: the field to blame.
    """

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


def application(system: RAGSystem, model: str = MODEL) -> Starlette:
    """An ASGI application: POST /v1/chat/completions, GET /v1/models, GET /health.

    The last message of the user is the question; a system message is the system prompt. Earlier turns
    are not read. An answer has, beside OpenAI's fields, `fedrag`: its sources with scores, and the ids
    of those that it cites. Where the environment has FEDRAG_API_KEY, callers must give it.

    Args:
      model: the name that callers ask for.
    """
    answering, key = Answering(system), os.environ.get(KEY, "")

    @contextlib.asynccontextmanager
    async def running(app):
        async with answering.running():
            yield

    async def health(request: Request):
        return JSONResponse({"status": "ok", "model": model})

    async def models(request: Request):
        _authorised(request, key)
        told = {"id": model, "object": "model", "created": 0, "owned_by": "fedrag"}
        return JSONResponse({"object": "list", "data": [told]})

    async def chat(request: Request):
        _authorised(request, key)
        body = await _body(request)
        question, system_prompt, how = _understood(body, model)
        told = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        if body.get("stream"):
            # Begun here: what cannot be answered is refused, and not broken off.
            written = await answering.stream(question, system_prompt, **how)
            return StreamingResponse(_events(written, told), media_type="text/event-stream")
        response = await answering.query(question, system_prompt, **how)
        return JSONResponse(told | _whole(response))

    async def refused(request: Request, error: Exception):
        status = 400 if isinstance(error, ConfigError | DataError) else 503
        status = error.status if isinstance(error, RequestError) else status
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        param = error.param if isinstance(error, RequestError) else None
        told = {"message": str(error), "type": kind, "param": param, "code": None}
        return JSONResponse({"error": told}, status_code=status)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        lifespan=running,
        exception_handlers={
            RequestError: refused,
            FedragError: refused,
        },
    )


def _authorised(request: Request, key: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise RequestError(401, "no or another API key: give it as 'Authorization: Bearer <key>'")


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise RequestError(413, f"a request may have {MOST_BYTES} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    return body


def _understood(body: dict[str, Any], model: str) -> tuple[str, str, dict[str, Any]]:
    """The question, the system prompt, and options of `RAGSystem.batch_query`."""
    for field, value in body.items():
        if field in HONOURED or field in PASSED or value is None:
            continue
        if field not in NEUTRAL or value not in NEUTRAL[field]:
            raise RequestError(
                400, f"{field}={json.dumps(value)[:100]} is not supported: leave it out", field
            )
    if body.get("model", model) != model:
        raise RequestError(404, f"model {body['model']!r} is not served; {model!r} is", "model")
    question, system_prompt = _messages(body.get("messages"))
    how: dict[str, Any] = {}
    for field, name, kinds in (
        ("max_tokens", "max_new_tokens", (int,)),
        ("max_completion_tokens", "max_new_tokens", (int,)),
        ("temperature", "temperature", (int, float)),
        ("top_p", "top_p", (int, float)),
        ("seed", "seed", (int,)),
        ("mode", "mode", (str,)),
        ("beams", "beams", (int,)),
    ):
        if (value := body.get(field)) is not None:
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise RequestError(
                    400, f"{field} must be {kinds[-1].__name__}, got {value!r}", field
                )
            how[name] = value
    if (stop := body.get("stop")) is not None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
            raise RequestError(400, f"stop must be a string or some, got {stop!r}", "stop")
        how["stop"] = tuple(stop)
    if body.get("stream_options") not in (None, {}, {"include_usage": False}):
        raise RequestError(
            400, "stream_options: tokens of streamed answers are not counted", "stream_options"
        )
    if not isinstance(body.get("stream", False), bool | None):
        raise RequestError(400, f"stream must be a boolean, got {body['stream']!r}", "stream")
    return question, system_prompt, how


def _messages(messages) -> tuple[str, str]:
    """The question and the system prompt."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RequestError(400, "messages must be a list of objects", "messages")
    said = [(m.get("role"), _text(m.get("content"))) for m in messages]
    if not said or said[-1][0] != "user" or not said[-1][1].strip():
        raise RequestError(400, "the last of messages must be the user's question", "messages")
    instructions = [text for role, text in said if role in ("system", "developer")]
    return said[-1][1], "\n\n".join(filter(None, instructions))


def _text(content) -> str:
    if isinstance(content, list):
        if not all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in content):
            raise RequestError(400, "content of a message must be text", "messages")
        return "".join(c["text"] for c in content)
    if not isinstance(content, str | None):
        raise RequestError(400, f"content of a message must be text, got {content!r}", "messages")
    return content or ""


def _whole(response: Response) -> dict[str, Any]:
    read, written = response.tokens
    message = {"role": "assistant", "content": response.answer, "refusal": None}
    found = [Found(*each) for each in zip(response.sources, response.scores, strict=True)]
    return {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": message, "logprobs": None, "finish_reason": response.finish}
        ],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
        "fedrag": _grounds(found, response.cited),
    }


def _grounds(found, cited) -> dict[str, Any]:
    """What an answer comes from."""
    return {
        "sources": [
            {"id": p.id, "title": p.title, "text": p.text, "score": score} for p, score in found
        ],
        "cited": [p.id for p in cited],
    }


async def _events(written: Written, told: dict[str, Any]):
    """Server-sent events of an answer that is being written; the last tells what it comes from."""

    def event(delta, finish=None, **more) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = told | {"object": "chat.completion.chunk", "choices": [choice]} | more
        return f"data: {json.dumps(chunk)}\n\n"

    async with contextlib.aclosing(written.pieces) as pieces:
        yield event({"role": "assistant", "content": ""})
        try:
            async for piece in pieces:
                yield event({"content": piece})
        except FedragError as error:
            yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"
            return
        yield event({}, written.finish(), fedrag=_grounds(written.found, written.cited()))
        yield "data: [DONE]\n\n"


def serve(system: RAGSystem, host: str, port: int, model: str = MODEL) -> None:
    """Serves until SIGINT or SIGTERM; requests under way are answered first.

    Args:
      port: 0 for any that is free; the address is told on standard error.

    Raises:
      ConfigError: the address cannot be had.
    """
    with listening(host, port) as (listener, address):
        settings = uvicorn.Config(
            application(system, model), log_level="info", timeout_graceful_shutdown=GRACE_S
        )
        print(f"serving {model} at {address}/v1", file=sys.stderr, flush=True)
        uvicorn.Server(settings).run(sockets=[listener])
