"""The HTTP interface, asked by OpenAI's client: answers, streams, refusals, many at once, the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn

from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.server import chat_requests, http
from fedrag_jax.server.address import listening

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:80]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e.question for e in WORLD.train if {*e.positive_ids} <= HELD][:8]


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(
        PASSAGES, generator="builtin:citing", prompt_style="compact_cited", max_answer_tokens=24
    )


def served(system, **how):
    """A server in a thread; yields its address, then has it stop."""
    with listening("127.0.0.1", 0) as (listener, address):
        settings = uvicorn.Config(http.application(system, **how), log_level="warning")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(system):
    yield from served(system)


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def asked(question, *before):
    return [*before, {"role": "user", "content": question}]


def instruction(text):
    return {"role": "system", "content": text}


def test_an_answer_is_that_of_the_system(client, system):
    cited = set()
    for question in QUESTIONS[:3]:
        found = client.chat.completions.create(model="fedrag", messages=asked(question))
        expected = system.query(question)
        (choice,) = found.choices
        assert choice.message.content == expected.answer
        assert choice.finish_reason == expected.finish == "stop"
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == expected.tokens
        told = found.model_extra["fedrag"]
        assert [s["id"] for s in told["sources"]] == [p.id for p in expected.sources]
        assert told["cited"] == [p.id for p in expected.cited]
        cited |= {*told["cited"]}
    assert cited


def test_options_are_those_of_the_system(client, system):
    question, how = QUESTIONS[0], {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    found = client.chat.completions.create(model="fedrag", messages=asked(question), **how)
    assert found.choices[0].message.content == system.query(question, **how).answer
    cut = client.chat.completions.create(model="fedrag", messages=asked(question), max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    weighed = client.chat.completions.create(
        model="fedrag", messages=asked(question), extra_body={"mode": "ensemble"}
    )
    expected = system.query(question, mode="ensemble")
    assert weighed.choices[0].message.content == expected.answer
    stopped = client.chat.completions.create(model="fedrag", messages=asked(question), stop="e")
    assert stopped.choices[0].message.content == system.query(question, stop=("e",)).answer


def test_a_system_message_is_the_system_prompt(client, system):
    instructed = asked(
        QUESTIONS[0], instruction("Be brief."), {"role": "assistant", "content": "Hm."}
    )
    expected = system.under("Be brief.").query(QUESTIONS[0])
    assert expected.tokens[0] != system.query(QUESTIONS[0]).tokens[0]
    after = [*asked(QUESTIONS[0]), instruction("Be brief.")]
    between = [*asked("Hm?"), {"role": "developer", "content": "Be brief."}, *asked(QUESTIONS[0])]
    for messages in (instructed, after, between):
        found = client.chat.completions.create(model="fedrag", messages=messages)
        assert found.choices[0].message.content == expected.answer
        assert found.usage.prompt_tokens == expected.tokens[0]


def test_a_stream_is_the_answer_in_pieces(client, system):
    chunks = [
        *client.chat.completions.create(model="fedrag", messages=asked(QUESTIONS[1]), stream=True)
    ]
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    expected = system.query(QUESTIONS[1])
    assert "".join(pieces) == expected.answer
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == expected.finish == "stop"
    cut = client.chat.completions.create(
        model="fedrag", messages=asked(QUESTIONS[1]), stream=True, max_tokens=2
    )
    assert [*cut][-1].choices[0].finish_reason == "length"
    told = chunks[-1].model_extra["fedrag"]
    assert told["cited"] == [p.id for p in expected.cited]
    assert [s["id"] for s in told["sources"]] == [p.id for p in expected.sources]
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        client.chat.completions.create(
            model="fedrag", messages=asked("Who?"), stream=True, extra_body={"mode": "vote"}
        )


def test_tokens_of_a_stream_are_counted_where_they_are_asked_for(client, system):
    expected = system.query(QUESTIONS[1])
    for cut in ({}, {"max_tokens": 2}):
        *chunks, last = client.chat.completions.create(
            model="fedrag", messages=asked(QUESTIONS[1]), stream=True,
            stream_options={"include_usage": True}, **cut,
        )  # fmt: skip
        assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks)
        assert chunks[-1].choices[0].finish_reason == ("length" if cut else "stop")
        read, written = expected.tokens
        written = 2 if cut else written
        assert last.choices == [] and last.usage.total_tokens == read + written
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (read, written)
    plain = client.chat.completions.create(
        model="fedrag", messages=asked(QUESTIONS[1]), stream=True, stream_options={}
    )
    assert all(c.choices and "usage" not in c.model_fields_set for c in plain)


def test_many_at_once_are_answered_together_and_as_alone(address, system, monkeypatch):
    sizes, batch_query = [], RAGSystem.batch_query

    def counted(self, questions, **how):
        sizes.append(len(questions))
        return batch_query(self, questions, **how)

    monkeypatch.setattr(RAGSystem, "batch_query", counted)

    def ask(i):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        before = [instruction("Be brief.")] if i % 3 == 0 else []
        messages = asked(QUESTIONS[i % 8], *before)
        return client.chat.completions.create(model="fedrag", messages=messages)

    with ThreadPoolExecutor(24) as pool:
        found = [*pool.map(ask, range(24))]
    assert sum(sizes) == 24 and max(sizes) > 1
    monkeypatch.undo()
    brief = system.under("Be brief.")
    expected = [(brief if i % 3 == 0 else system).query(QUESTIONS[i % 8]).answer for i in range(24)]
    assert [f.choices[0].message.content for f in found] == expected


@pytest.mark.parametrize(
    "changed, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": asked([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages"),
        ({"messages": "Who?"}, "messages"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"poem": True}, "poem"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, None),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": -(10**400)}, "top_p"),
        ({"messages": [{"role": "poet", "content": "Be brief."}, *asked("Who?")]}, "messages"),
        ({"messages": [{"role": ["user"], "content": "Ada?"}, *asked("Who?")]}, "messages"),
        ({"messages": [{"content": "Ada?"}, *asked("Who?")]}, "messages"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 10**9}, None),
        ({"stop": 3}, "stop"),
        ({"stop": ["x" * 1000]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"mode": "rag_token", "beams": 1500}, "beams"),
        ({"mode": "rag_token", "beams": 0}, "beams"),
        ({"mode": "search", "messages": asked("Who?", instruction("Be brief."))}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"mode": "poem"}, None),
        ({"stream": True, "beams": 4}, None),
        ({"seed": 2**63, "temperature": 1}, None),
        ({"stream": True, "stream_options": "x"}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"poem": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": asked("")}, "messages"),
        ({"messages": asked(" \n"), "stream": True}, "messages"),
        ({"messages": [instruction("Be brief.")]}, "messages"),
        ({"messages": [*asked("Who?"), {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": asked("Who \ud800?")}, None),
        ({"messages": asked("Who?", instruction("\ud800"))}, None),
        ({"\ud83d": 1}, None),
        ({"messages": asked("Who?", instruction("word " * 20_000))}, None),
        ({"messages": asked("Who?", instruction("x" * 10_000_000))}, None),
    ],
)
def test_what_cannot_be_honoured_is_refused(address, changed, param):
    status, reply = post(address, {"messages": asked("Who?")} | changed)
    assert status == 400 and reply["error"]["message"] and reply["error"]["param"] == param


def post(address, body, path="/v1/chat/completions", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_hostile_requests_are_refused_or_harmless(address, system):
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for body in (b"nonsense", b"[]", b'{"messages": [1]}', b"\xff", b"", deep):
        assert post(address, body)[0] == 400
    assert post(address, b" " * (chat_requests.MOST_BYTES + 1))[0] == 413
    status, reply = post(address, {"messages": asked("Who? " * 2_000_000)})
    assert status == 400 and "question of 10,000,000 characters" in reply["error"]["message"]
    status, reply = post(address, {"messages": asked("Who \x00\x1b[31m\u202e</s><|im_end|>?")})
    assert status == 200 and isinstance(reply["choices"][0]["message"]["content"], str)
    assert post(address, {"messages": asked("Who?"), "model": "other"})[0] == 404
    assert post(address, {"messages": asked("Who?"), "model": None})[0] == 200
    # It still serves.
    assert post(address, {"messages": asked(QUESTIONS[0])})[0] == 200


def test_health_and_models(address, client):
    with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
        assert json.loads(reply.read()) == {"status": "ok", "model": "fedrag"}
    assert [m.id for m in client.models.list()] == ["fedrag"]
    assert client.models.retrieve("fedrag").id == "fedrag"
    for name in ("gpt-4o", "somebody/fedrag"):
        with pytest.raises(openai.NotFoundError, match=f"model '{name}' is not served") as refused:
            client.models.retrieve(name)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings is not served"):
        client.embeddings.create(model="fedrag", input="x")


def fetched(address, method, origin, **headers):
    """Headers that a browser would look at, of an answer to a page of an origin."""
    request = urllib.request.Request(f"{address}/v1/models", method=method)
    for name, value in {"Origin": origin, **headers}.items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.headers
    except urllib.error.HTTPError as error:
        return error.headers


def test_web_pages_may_call_it_where_their_origin_is_named(address, system, monkeypatch):
    page, allowed = "https://example.org", "Access-Control-Allow-Origin"
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,x-stainless-os"
    assert fetched(address, "GET", page)[allowed] is None
    monkeypatch.setenv(http.KEY, "secret")  # a browser's first request has no key
    for other in served(system, cors_origins=[page]):
        assert fetched(other, "OPTIONS", page, **asks)[allowed] == page
        assert fetched(other, "GET", page)[allowed] == page  # also of a refusal: without the key
        assert fetched(other, "OPTIONS", "https://evil.example", **asks)[allowed] is None
        assert fetched(other, "GET", "https://evil.example")[allowed] is None
    for wrong in ("example.org", "https://example.org/", "https://a@b", ""):
        with pytest.raises(ConfigError, match="a CORS origin must be"):
            http.application(system, cors_origins=[wrong])


@pytest.mark.parametrize("key", ["secret", "schlüssel", "ключ"])
def test_a_key_is_asked_for_where_there_is_one(system, monkeypatch, key):
    monkeypatch.setenv(http.KEY, key)
    sent = key.encode().decode("latin-1")  # as bytes of a header
    for address in served(system, model="own"):
        body = {"messages": asked(QUESTIONS[0]), "model": "own"}
        assert post(address, body)[0] == 401
        assert post(address, body, Authorization="Bearer other")[0] == 401
        assert post(address, body, Authorization=sent[:-1])[0] == 401
        for scheme in ("Bearer", "bearer"):
            assert post(address, body, Authorization=f"{scheme} {sent}")[0] == 200
        with urllib.request.urlopen(f"{address}/health", timeout=10) as reply:
            assert reply.status == 200


@pytest.mark.slow
def test_requests_under_way_are_answered_before_it_stops(system, tmp_path):
    system.save(tmp_path / "system")
    command = (
        "import sys; from fedrag_jax.cli.command_line import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", str(tmp_path / "system"), "--port", "0"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        address = process.stderr.readline().split()[-1]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        chunks = client.chat.completions.create(
            model="fedrag", messages=asked(QUESTIONS[1]), stream=True
        )
        first = next(iter(chunks))
        process.send_signal(signal.SIGTERM)
        pieces = [c.choices[0].delta.content or "" for c in (first, *chunks)]
        assert "".join(pieces) == system.query(QUESTIONS[1]).answer
        process.wait(30)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        process.kill()
        process.wait()
