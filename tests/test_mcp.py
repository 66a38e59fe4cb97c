"""MCP both ways: any tool as a store, and a system as a server; processes and sockets are real."""

import asyncio
import contextlib
import functools
import gc
import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from mcp import Client
from mcp.types import TextContent

from fedrag_jax.data import synthetic
from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore, StoreUnreachable
from fedrag_jax.retrieval.stores.mcp import MCPStore
from fedrag_jax.retrieval.stores.mcp_replies import USUAL, Shape, read
from fedrag_jax.retrieval.stores.registry import open_store
from fedrag_jax.server.mcp_server import mcp_server, run

FOREIGN = [sys.executable, str(pathlib.Path(__file__).with_name("foreign_mcp.py"))]
WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:24]
HELD = {p.id for p in PASSAGES}
QUESTIONS = [e.question for e in WORLD.test if {*e.positive_ids} <= HELD]


def started(tool, **how):
    return MCPStore(tool, **{"command": FOREIGN, "question": "query", "k": None} | how)


def texts(found):
    return [[f.passage.text for f in some] for some in found]


def ended(pid, within=10.0):
    """Whether a process is gone, and no zombie of it is left."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(*command, **how):
    child = subprocess.Popen(command, text=True, **how)
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=10)


def wait_for(port):
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise TimeoutError(port)


@pytest.fixture(scope="module")
def foreign():
    """Stores that ask one server, over HTTP."""
    port = free_port()
    with process(*FOREIGN, str(port), stderr=subprocess.DEVNULL):
        wait_for(port)
        url = f"http://127.0.0.1:{port}/mcp"
        yield functools.partial(MCPStore, url=url, question="query", k=None)


@pytest.fixture(scope="module")
def lookup(foreign):
    with foreign("lookup", arguments={"shelf": "third"}) as store:
        yield store


# --- any tool -------------------------------------------------------------------------------------


def test_texts_of_a_foreign_tool_are_passages(lookup):
    first, second = lookup.search(["Ann", "Bob"], k=5)
    assert texts([first, second]) == [
        ["Ann is on the third shelf.", "Rome is a city.", "[1] Oslo."],
        ["Bob is on the third shelf.", "Rome is a city.", "[1] Oslo."],
    ]
    assert [f.score for f in first] == [1, 1 / 2, 1 / 3]
    assert first[1].passage.id == hashlib.sha256(b"Rome is a city.").hexdigest()
    assert first[1:] == second[1:]
    assert texts(lookup.search(["Ann"], k=1)) == [["Ann is on the third shelf."]]
    assert lookup.search([]) == []
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        lookup.search(["Ann"], k=0)
    with pytest.raises(
        ConfigError, match="questions must be a list of strings, got the string 'Ann'"
    ):
        lookup.search("Ann")


def test_a_system_answers_from_a_foreign_tool(lookup, system):
    over = system.over(lookup)
    (found,) = over.retrieve(["Where is Ann?"], 2)
    assert texts([found]) == [["Where is Ann? is on the third shelf.", "Rome is a city."]]
    response = over.query("Where is Ann?")
    assert response.sources[:2] == tuple(f.passage for f in found)
    assert response.answer == over.answer(["Where is Ann?"], [response.sources])[0]
    assert not isinstance(lookup, KnowledgeStore)


def test_json_in_a_text_is_read_and_k_is_passed_on(foreign):
    with foreign("search_documents", k="limit") as store:
        (found,) = store.search(["Ann"], k=2)
    # Four were told, the best last; the number asked for is what comes.
    assert found == [
        (Passage("s3", "T3", "Ann 3"), 3 / 8), (Passage("s2", "T2", "Ann 2"), 2 / 8),
    ]  # fmt: skip


def test_a_shape_says_where_things_are(foreign):
    shape = Shape(passages="reply.rows", text="prose.en", id="key", title="label", score="")
    with foreign("deep", shape=shape) as store:
        (found,) = store.search(["Ann"])
    far = hashlib.sha256(b"far").hexdigest()
    assert found == [(Passage("7", "Seven", "Ann"), 1.0), (Passage(far, "", "far"), 0.5)]
    with (
        foreign("deep") as store,
        pytest.raises(
            DataError,
            match=r"tool 'deep'.* to 'Ann' has no list of passages .*'query', 'reply'; say where",
        ),
    ):
        store.search(["Ann"])
    with (
        foreign("deep", shape=Shape(passages="reply.rows")) as store,
        pytest.raises(
            DataError,
            match=r"a passage without a text .*'key', 'label', 'prose', 'score'; say where",
        ),
    ):
        store.search(["Ann"])
    with foreign("resource") as store:
        (found,) = store.search(["Ann"])
    assert found == [(Passage("file:///Ann.txt", "", "The file Ann."), 1.0)]


def text(value):
    return TextContent(type="text", text=value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("structured", "blocks", "expected"),
    [
        ({"result": [{"text": "a"}, {"text": "b"}]}, [], ["a", "b"]),
        ({"result": "plain"}, [], ["plain"]),
        ({"result": {"hits": ["a", "b", "a"]}}, [], ["a", "b"]),
        ({"results": [{"title": "T", "description": "a"}], "text": "no"}, [], ["a"]),
        ({"text": "alone"}, [], ["alone"]),
        ({"passages": []}, [text("not looked at")], []),
        (None, [], []),
        (None, [text({"documents": [{"content": "a"}]}), text("b")], ["a", "b"]),
        (None, [text("{not JSON")], ["{not JSON"]),
        (None, [text([])], []),
        (None, [text("[" * 100_000)], ["[" * 100_000]),
    ],
)
def test_usual_shapes_are_understood(structured, blocks, expected):
    assert texts([read(structured, blocks, USUAL, "it")]) == [expected]


def test_scores_order_only_where_all_have_one():
    def scores(*told):
        rows = [{"id": i, "text": str(i), "score": score} for i, score in enumerate(told)]
        return [(f.passage.id, f.score) for f in read(rows, [], USUAL, "it")]

    assert scores(1, 3, 2.5, 3) == [("1", 3), ("3", 3), ("2", 2.5), ("0", 1)]
    for odd in (None, "high", True, float("nan")):
        assert scores(1, odd, 3) == [("0", 1), ("1", 1 / 2), ("2", 1 / 3)]


@pytest.mark.parametrize(
    "value", [[3], [{"id": 1}], [{"text": " "}], {"n": 1}, [{"text": "\ud800"}]]
)
def test_what_is_no_passage_is_refused(value):
    with pytest.raises(DataError, match=r"it has (a passage|no list of passages)"):
        read(value, [], USUAL, "it")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"tool": "find"}, "tool 'find' of .*: there is no such tool, but deep, fatal, lookup,"),
        ({"k": "k"}, "takes the arguments query, shelf; there is no 'k': set question=, k="),
        ({"question": "q"}, "it requires 'query': set question="),
        ({"command": ["x"]}, "either started or called"),
        ({"url": ""}, r"either started or called.*command=\(\)"),
        ({"command": "python x", "url": ""}, "a list such as"),
        ({"url": "http://me:key@x/mcp"}, "name no user, got 'http://x/mcp'"),
        ({"url": "file:///x"}, "must begin with http"),
        ({"timeout": 0}, "timeout must be > 0"),
        ({"env": {"a": "b"}}, "headers go with url, and env with command"),
        ({"arguments": {"shelf": {1}}}, "arguments must be JSON"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(foreign, how, words):
    with pytest.raises(ConfigError, match=words):
        foreign(**{"tool": "lookup"} | how)


def test_who_is_not_there_is_named():
    with pytest.raises(StoreUnreachable, match=r"'nonsuch' starts does not answer.*No such file"):
        MCPStore(command=["nonsuch"])
    with pytest.raises(
        StoreUnreachable, match=r"(?s)not answer.*it said: .*No module named nonsuch"
    ):
        MCPStore(command=[sys.executable, "-m", "nonsuch"])
    with pytest.raises(StoreUnreachable, match=r"server at http://127.0.0.1:9/mcp does not answer"):
        MCPStore(url="http://127.0.0.1:9/mcp?key=secret")
    with pytest.raises(StoreUnreachable, match=r"was not there within 0.2 s: give it more"):
        MCPStore(command=["sleep", "60"], timeout=0.2)


def test_a_missing_package_is_named_by_who_needs_it():
    code = (
        "import sys; sys.modules['mcp'] = None\n"
        "from fedrag_jax.errors import ConfigError\n"
        "from fedrag_jax.retrieval.stores.registry import store_class\n"
        "try: store_class('mcp')(url='http://x')\n"
        "except ConfigError as error: print(error)\n"
        "try: import fedrag_jax.server.mcp_server\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.count("pip install 'fedrag-jax[mcp]'") == 2


def test_a_tool_that_refuses_is_quoted(foreign):
    with foreign("refuse") as store:
        for _ in range(2):  # the connection holds
            with pytest.raises(
                StoreUnreachable, match=r"to 'Ann' is an error: .*no shelf holds Ann"
            ):
                store.search(["Ann"])


def test_a_late_answer_is_given_up_and_the_next_one_is_not(foreign):
    with foreign("stuck", timeout=1.0) as store:
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match=r"gave no answer within 1 s: give it more"):
            store.search(["Bob", "Ann", "Bob"])
        assert time.monotonic() - began < 5
        assert texts(store.search(["Bob"])) == [["Bob"]]


def test_a_store_that_is_closed_while_asked_says_so(foreign):
    store = foreign("stuck")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.search, ["Ann"])
        time.sleep(0.3)
        store.close()
        with pytest.raises(ConfigError, match="is closed: make a new one"):
            asked.result()


def test_many_threads_share_a_connection(foreign):
    with foreign("slow", at_once=3) as store:

        def ask(number):
            return texts(store.search([f"{number}a", f"{number}b"]))

        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(ask, range(16))]
    for number, ((one,), (other,)) in enumerate(answers):
        assert one.startswith(f"{number}a ") and other.startswith(f"{number}b ")
    assert max(int(one.split()[1]) for pair in answers for (one,) in pair) == 3


def test_a_server_that_was_killed_is_started_once_more():
    with started("process") as store:
        ((first,),) = texts(store.search(["?"]))
        os.kill(int(first), signal.SIGKILL)
        with ThreadPoolExecutor(6) as pool:
            after = {texts(found)[0][0] for found in pool.map(store.search, [["?"]] * 12)}
        assert len(after) == 1 and after != {first} and ended(int(first))
    assert ended(int(after.pop()))
    store.close()
    with pytest.raises(ConfigError, match="is closed: make a new one"):
        store.search(["?"])


@pytest.mark.slow
def test_a_server_that_dies_of_a_question_is_asked_twice(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    with started("fatal") as store:
        assert texts(store.search([str(marker)])) == [["alive"]] and not marker.exists()
        with pytest.raises(
            StoreUnreachable, match=r"(?s)went away.*I have had enough.*is it running"
        ):
            store.search(["now"])
        assert texts(store.search([str(marker)])) == [["alive"]]


@pytest.mark.slow
def test_no_process_outlives_its_store():
    store = started("process")
    ((pid,),) = texts(store.search(["?"]))
    del store
    gc.collect()
    assert ended(int(pid))
    code = (
        "from fedrag_jax.retrieval.stores.mcp import MCPStore\n"
        f"store = MCPStore('process', command={FOREIGN!r}, question='query', k=None)\n"
        "print(store.search(['?'])[0][0].passage.text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr and ended(int(done.stdout))


# --- on disk --------------------------------------------------------------------------------------


def test_a_saved_store_is_opened_only_where_it_is_trusted(tmp_path, monkeypatch):
    with started("secret", env={"FOREIGN_KEY": "sesame"}, shape=Shape(text="text")) as store:
        assert texts(store.search(["?"])) == [["sesame"]]
        store.save(tmp_path / "s")
    assert "sesame" not in (tmp_path / "s" / "store.json").read_text()
    with pytest.raises(
        CheckpointError, match=r"foreign_mcp.py' starts\): if you trust .*elsewhere=True"
    ):
        open_store(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"wants 'FOREIGN_KEY'.*set FEDRAG_MCP_FOREIGN_KEY"):
        open_store(tmp_path / "s", elsewhere=True)
    monkeypatch.setenv("FEDRAG_MCP_FOREIGN_KEY", "open")
    with open_store(tmp_path / "s", elsewhere=True) as again:
        assert texts(again.search(["?"])) == [["open"]]
        assert again._settings() == store._settings()


def test_no_command_of_a_folder_runs_without_consent(foreign, tmp_path):
    ran = tmp_path / "ran"
    with foreign("lookup") as store:
        store.save(tmp_path / "s")
    saved = json.loads((tmp_path / "s" / "store.json").read_text())
    saved["settings"] |= {"command": ["touch", str(ran)], "url": ""}
    (tmp_path / "s" / "store.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=f"'touch {ran}' starts"):
        open_store(tmp_path / "s")
    # Nor as part of a hybrid that names another place to agree to.
    inner = tmp_path / "h" / "store-data-1"
    for part in ("part-0", "part-1"):
        (inner / part / "store-data-1").mkdir(parents=True)
        (inner / part / "store.json").write_text(json.dumps(saved))
    told = {"depth": 9, "parts": 2, "elsewhere": "Qdrant at http://localhost"}
    hybrid = {"format": 1, "kind": "hybrid", "settings": told, "data": "store-data-1"}
    (tmp_path / "h" / "store.json").write_text(json.dumps(hybrid))
    with pytest.raises(CheckpointError, match="a store of kind 'mcp' is no part of another"):
        open_store(tmp_path / "h", elsewhere=True)
    assert not ran.exists()
    with pytest.raises(StoreUnreachable):
        open_store(tmp_path / "s", elsewhere=True)
    assert ran.exists()


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("age", [[], ["old"]])
def test_over_http_a_server_may_go_and_come_back(tmp_path, age):
    port = free_port()
    url = f"http://127.0.0.1:{port}/mcp"

    @contextlib.contextmanager
    def served():
        with process(*FOREIGN, str(port), *age, stderr=subprocess.DEVNULL):
            wait_for(port)
            yield

    with contextlib.ExitStack() as after:
        with served():
            address = {"command": (), "url": url + "?key=sesame", "headers": {"X-Key": "open"}}
            store = after.enter_context(started("lookup", **address))
            assert store._link._client.protocol_version < "2026" or not age
            assert texts(store.search(["Ann"]))[0][0] == "Ann is on the any shelf."
        with pytest.raises(StoreUnreachable, match=f"at {url} does not answer.*is it running"):
            store.search(["Ann"])
        for question in ("Bob", "Cy"):  # once after a miss, once without having been missed
            with served():
                assert texts(store.search([question]))[0][0] == f"{question} is on the any shelf."
    store.save(tmp_path)
    saved = (tmp_path / "store.json").read_text()
    assert "sesame" not in saved and "open" not in saved
    with pytest.raises(
        ConfigError, match="wants 'X-Key', which was not saved: set FEDRAG_MCP_X_KEY"
    ):
        open_store(tmp_path, elsewhere=True)


# --- a system as a server -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(PASSAGES, top_k=3)


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
        def query(self, question):
            response = super().query(question)
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
