"""Any tool of an MCP server as a store: what it says is read, and what is saved opens with consent."""

import contextlib
import hashlib
import json
import subprocess

import pytest
from mcp.types import TextContent
from mcp_processes import FOREIGN, free_port, process, started, texts, wait_for

from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import CheckpointError, ConfigError, DataError
from fedrag_jax.retrieval.stores.knowledge_store import KnowledgeStore, StoreUnreachable
from fedrag_jax.retrieval.stores.mcp_replies import USUAL, Shape, read
from fedrag_jax.retrieval.stores.registry import open_store


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
    with pytest.raises(CheckpointError, match="a store of kind 'mcp' cannot be part of another"):
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
