"""A system as an MCP server: its tools, what they refuse, and processes that serve a saved one."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from mcp import Client
from mcp_processes import QUESTIONS, process

from fedrag_jax.errors import CheckpointError, ConfigError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.mcp import MCPStore
from fedrag_jax.retrieval.stores.mcp_replies import USUAL, read
from fedrag_jax.server.mcp_server import mcp_server, run


def called(system, *calls):
    async def ask():
        async with Client(mcp_server(system)) as client:
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return asyncio.run(ask())


def test_the_tools_of_a_server(system):
    question = QUESTIONS[0]
    retrieved, two, asked = called(
        system,
        ("retrieve", {"question": question}),
        ("retrieve", {"question": question, "k": 2}),
        ("ask", {"question": question}),
    )
    (found,) = system.retrieve([question])
    assert read(retrieved.structured_content, [], USUAL, "it") == found
    assert len(two.structured_content["passages"]) == 2
    response, answer = system.query(question), asked.structured_content
    assert answer["answer"] == response.answer and answer["citations"] == []
    assert [s["id"] for s in answer["sources"]] == [p.id for p in response.sources]
    assert {*answer["sources"][0]} == {"id", "title", "text", "topic", "score"}


def test_citations_are_ids(system):
    class Cites(RAGSystem):
        def query(self, question, **how):
            response = super().query(question, **how)
            return response._replace(cited=response.sources[1:])

    fields = {name: getattr(system, name) for name in RAGSystem.__dataclass_fields__}
    (asked,) = called(Cites(**fields), ("ask", {"question": QUESTIONS[0]}))
    ids = [s["id"] for s in asked.structured_content["sources"]]
    assert asked.structured_content["citations"] == ids[1:]


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("retrieve", {}, "question"),
        ("retrieve", {"question": " "}, "question 1 of 1 is blank: ask something"),
        ("ask", {"question": ""}, "question 1 of 1 is blank: ask something"),
        ("ask", {"question": "x" * 8193}, "at most 8192 characters"),
        ("retrieve", {"question": "x", "k": 0}, "greater than or equal to 1"),
        ("retrieve", {"question": "x", "k": "many"}, "valid integer"),
        ("retrieve", {"question": "x", "k": 25}, "24 passages"),
        ("forget", {}, "forget"),
    ],
)
def test_what_a_tool_cannot_do_is_its_error(system, tool, arguments, words):
    (result,) = called(system, (tool, arguments))
    assert result.is_error and words in result.content[0].text


def test_the_loop_stays_free_while_an_answer_is_written(system, monkeypatch):
    may_write, query = threading.Event(), RAGSystem.query

    def slow(self, question, **how):
        assert may_write.wait(60)
        return query(self, question, **how)

    monkeypatch.setattr(RAGSystem, "query", slow)

    async def ask():
        async with Client(mcp_server(system)) as client:
            answer = asyncio.create_task(client.call_tool("ask", {"question": QUESTIONS[0]}))
            found = await client.call_tool("retrieve", {"question": QUESTIONS[1], "k": 1})
            assert len(found.structured_content["passages"]) == 1 and not answer.done()
            may_write.set()
            return (await answer).structured_content["answer"]

    assert asyncio.run(ask()) == query(system, QUESTIONS[0]).answer


def test_an_address_that_cannot_be_had_is_refused(system):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on host '127.0.0.1', port .*in use"):
            run(system, "http", port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"transport must be one of .* got 'sse'"):
        run(system, "sse")


SERVE = (
    "import sys; from fedrag_jax.rag import RAGSystem; from fedrag_jax.server.mcp_server import run\n"
    "system = RAGSystem.load(sys.argv[1])\n"
    "sound = type(system).retrieve\n"
    "def loud(*given): print('not protocol', flush=True); return sound(*given)\n"
    "type(system).retrieve = loud\n"
    "run(system, sys.argv[2], port=0)"
)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_another_process_serves_a_saved_system(system, tmp_path, transport):
    system.save(tmp_path / "s")
    command = [sys.executable, "-c", SERVE, str(tmp_path / "s"), transport]
    with contextlib.ExitStack() as after:
        if transport == "http":
            child = after.enter_context(process(*command, stderr=subprocess.PIPE))
            said = next(line for line in child.stderr if line.startswith("serving MCP at "))
            how = {"url": said.split()[-1]}
            refused = httpx2.post(how["url"], headers={"Host": "evil.example"}, json={})
            assert refused.status_code == 421
        else:
            how = {"command": command, "env": dict(os.environ), "timeout": 120.0}
        store = after.enter_context(MCPStore(**how))
        # One at a time, as the server embeds them: then the very numbers are the same.
        assert store.search(QUESTIONS, k=4) == [system.retrieve([q], 4)[0] for q in QUESTIONS]
        over, expected = RAGSystem.build(store=store, top_k=3), system.batch_query(QUESTIONS)
        answered = over.batch_query(QUESTIONS)
        assert [r.answer for r in answered] == [r.answer for r in expected]
        assert [r.sources for r in answered] == [r.sources for r in expected]
        np.testing.assert_allclose(
            [r.scores for r in answered], [r.scores for r in expected], rtol=1e-5
        )
        with ThreadPoolExecutor(4) as pool:
            asked = [*pool.map(lambda q: store.search([q], k=3)[0], QUESTIONS * 4)]
        assert asked == store.search(QUESTIONS * 4, k=3)
        with pytest.raises(StoreUnreachable, match="24 passages"):
            store.search(QUESTIONS, k=25)
        over.save(tmp_path / "over")
    with pytest.raises(CheckpointError, match="elsewhere=True"):
        RAGSystem.load(tmp_path / "over")


@pytest.mark.slow
def test_a_saved_system_over_a_served_one_opens_with_consent(system, tmp_path, monkeypatch):
    system.save(tmp_path / "s")
    command = [sys.executable, "-c", SERVE, str(tmp_path / "s"), "stdio"]
    monkeypatch.setenv("FEDRAG_MCP_JAX_PLATFORMS", "cpu")
    with MCPStore(command=command, env={"JAX_PLATFORMS": "cpu"}, timeout=120.0) as store:
        RAGSystem.build(store=store, top_k=3).save(tmp_path / "over")
    again = RAGSystem.load(tmp_path / "over", elsewhere=True)
    assert again.query(QUESTIONS[0]).answer == system.query(QUESTIONS[0]).answer
    again.store.close()
