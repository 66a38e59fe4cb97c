"""What goes wrong between a store and its MCP server: refusals, late answers, processes that die."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mcp_processes import FOREIGN, ended, started, texts

from fedrag_jax.errors import ConfigError
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable
from fedrag_jax.retrieval.stores.mcp import MCPStore


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
    with foreign("stuck", timeout=5.0) as store:  # connecting takes seconds on a busy machine
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match=r"gave no answer within 5 s: give it more"):
            store.search(["Bob", "Ann", "Bob"])
        assert time.monotonic() - began < 20
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
