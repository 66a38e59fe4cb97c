"""Strict parsing of requests to the OpenAI-like HTTP API."""

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from fedrag_jax.data.examples import half_character
from fedrag_jax.errors import DataError
from fedrag_jax.generation.inference import SEARCH, require_asked

MOST_BYTES = 16 << 20  # of a request
# Of the interface: what changes an answer is honoured or refused, what does not is let pass.
HONOURED = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens",
            "temperature", "top_p", "seed", "stop", "mode", "beams"}  # fmt: skip
PASSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
          "parallel_tool_calls"}  # fmt: skip
NEUTRAL = {"n": (1,), "logprobs": (False,), "frequency_penalty": (0,), "presence_penalty": (0,),
           "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
           "response_format": ({"type": "text"},), "modalities": (["text"],)}  # fmt: skip
MOST_BEAMS = 16  # each has a cache of its own
MOST_STOPS, LONGEST_STOP = 16, 256  # number of stop strings, and characters of each
STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # the second changes no answer
INSTRUCTING = ("system", "developer")  # roles whose messages are the system prompt
ROLES = (*INSTRUCTING, "user", "assistant", "tool", "function")


class RequestError(Exception):
    """A request that is answered with an API error.

    Attributes:
      status: the HTTP status.
      param: the field that caused the error.
      code: the API's error code, such as "model_not_found".
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def require_model(asked: str, model: str) -> None:
    """Refuses any name but that of the served model."""
    if asked != model:
        told = f"model {asked!r} is not served; {model!r} is"
        raise RequestError(404, told, "model", "model_not_found")


async def read_body(parts: AsyncIterator[bytes]) -> dict[str, Any]:
    """Reads the JSON object in the body of a request."""
    data = bytearray()
    async for part in parts:
        data += part
        if len(data) > MOST_BYTES:
            raise RequestError(413, f"a request may have at most {MOST_BYTES} bytes")
    try:
        body = json.loads(data)
        fault = half_character(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    if fault:
        raise RequestError(400, f"the body {fault}")
    return body


def understood(body: dict[str, Any], model: str) -> tuple[str, str, dict[str, Any]]:
    """Returns the question, the system prompt, and options of `RAGSystem.batch_query`."""
    for field, value in body.items():
        if field in HONOURED or field in PASSED or value is None:
            continue
        if field not in NEUTRAL or value not in NEUTRAL[field]:
            raise RequestError(
                400, f"{field}={json.dumps(value)[:100]} is not supported: leave it out", field
            )
    asked = body.get("model")
    require_model(model if asked is None else asked, model)
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
            if float in kinds and abs(value) > sys.float_info.max:
                raise RequestError(400, f"{field} is too large for a number", field)
            how[name] = value
    if how.get("mode") == SEARCH and system_prompt:
        told = "system messages do not apply to mode 'search', which has an instruction of its own"
        raise RequestError(400, told, "messages")
    if not 1 <= how.get("beams", 1) <= MOST_BEAMS:
        told = f"beams must be from 1 to {MOST_BEAMS}, got {how['beams']}"
        raise RequestError(400, told, "beams")
    if (stop := body.get("stop")) is not None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
            raise RequestError(
                400, f"stop must be a string or a list of strings, got {stop!r}", "stop"
            )
        if len(stop) > MOST_STOPS or any(len(s) > LONGEST_STOP for s in stop):
            told = f"stop may have {MOST_STOPS} strings of {LONGEST_STOP} characters at most"
            raise RequestError(400, told, "stop")
        how["stop"] = tuple(stop)
    if not isinstance(body.get("stream", False), bool | None):
        raise RequestError(400, f"stream must be a boolean, got {body['stream']!r}", "stream")
    _require_stream_options(body.get("stream_options"), bool(body.get("stream")))
    return question, system_prompt, how


def _require_stream_options(options, streamed: bool) -> None:
    if options is None:
        return
    if not isinstance(options, dict) or not all(
        name in STREAM_OPTIONS and isinstance(value, bool) for name, value in options.items()
    ):
        told = f"stream_options has {[*STREAM_OPTIONS]}, true or false, got {options!r}"
        raise RequestError(400, told, "stream_options")
    if not streamed:
        told = (
            "stream_options apply to streamed answers only: leave them out, or set stream to true"
        )
        raise RequestError(400, told, "stream_options")


def _messages(messages) -> tuple[str, str]:
    """Returns the question and the system prompt."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RequestError(400, "messages must be a list of objects", "messages")
    said = [(m.get("role"), _text(m.get("content"))) for m in messages]
    if unknown := [role for role, _ in said if role not in ROLES]:
        told = f"role of a message must be one of {[*ROLES]}, got {unknown[0]!r}"
        raise RequestError(400, told, "messages")
    instructions = [text for role, text in said if role in INSTRUCTING]
    turns = [(role, text) for role, text in said if role not in INSTRUCTING]
    if not turns or turns[-1][0] != "user":
        told = "the last message, apart from system messages, must be the user's question"
        raise RequestError(400, told, "messages")
    question = turns[-1][1]
    try:
        require_asked([question])
    except DataError as error:
        raise RequestError(400, str(error), "messages") from error
    return question, "\n\n".join(filter(None, instructions))


def _text(content) -> str:
    if isinstance(content, list):
        if not all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in content):
            raise RequestError(400, "content of a message must be text", "messages")
        return "".join(c["text"] for c in content)
    if not isinstance(content, str | None):
        raise RequestError(400, f"content of a message must be text, got {content!r}", "messages")
    return content or ""
