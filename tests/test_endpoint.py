"""An author behind a real HTTP server on this machine: what is sent, tried again and refused."""

import dataclasses
import time

import pytest
from chat_server import Server, said

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.author import Reply, Request
from fedrag_jax.generation.endpoint import EndpointAuthor, EndpointError
from fedrag_jax.generation.text import Sampling
from fedrag_jax.label_free.prompts import instruct
from fedrag_jax.label_free.replies import replies

SAMPLING = Sampling(max_new_tokens=20, temperature=0.5, seed=3)
ASKED = [Request("Be kind.", f"question {i}", "### Start\n") for i in range(12)]


def echo(body, tried):
    return 200, said("re: " + body["messages"][-1]["content"])


def test_every_request_is_sent_as_it_is_and_answered_in_order():
    def slow_first(body, tried):
        time.sleep(0.2 * body["messages"][-1]["content"].endswith(" 0"))
        return echo(body, tried)

    with Server(slow_first) as server:
        author = EndpointAuthor(server.url, "m", api_key="secret", at_once=4)
        replies = [*author(ASKED, SAMPLING)]
        assert replies == [Reply(f"re: question {i}", True) for i in range(12)]
        assert 1 < server.most <= 4
        path, body = next(
            b for b in server.bodies if b[1]["messages"][-1]["content"] == "question 5"
        )
        assert path == "/v1/chat/completions"
        assert body["messages"] == [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "question 5"},
        ]  # fmt: skip
        assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == (
            "m",
            20,
            0.5,
            3,
        )
        assert {h["authorization"] for h in server.headers} == {"Bearer secret"}
        [*author([Request("", "alone", "")], SAMPLING)]
        assert [m["role"] for m in server.bodies[-1][1]["messages"]] == ["user"]
    assert author.name == "m"


def test_what_ends_a_reply_is_sent_and_a_text_to_be_continued_refused():
    with Server(echo) as server:
        author = EndpointAuthor(server.url, "m")
        [*author(ASKED[:1], dataclasses.replace(SAMPLING, stop=("END",)))]
        assert server.bodies[-1][1]["stop"] == ["END"]
        with pytest.raises(
            ConfigError, match="is a chat endpoint, but these prompts are texts to continue"
        ):
            [*author([Request("", "Text:", "", chat=False)], SAMPLING)]
        assert len(server.bodies) == 1


def test_a_text_cut_short_is_not_finished():
    with Server(lambda body, tried: (200, said("re", "length"))) as server:
        assert [*EndpointAuthor(server.url, "m")(ASKED[:1], SAMPLING)] == [Reply("re", False)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_for_a_moment_is_tried_again(status):
    def moody(body, tried):
        return (status, {"error": {"message": "busy"}}) if tried < 3 else echo(body, tried)

    with Server(moody) as server:
        replies = [*EndpointAuthor(server.url, "m", retries=2)(ASKED[:3], SAMPLING)]
        assert [r.text for r in replies] == [f"re: question {i}" for i in range(3)]
        assert set(server.tries.values()) == {3}
        with pytest.raises(EndpointError, match=r"m at http.*/v1: .*busy.*is it running"):
            [*EndpointAuthor(server.url, "m", retries=1)([Request("", "new", "")], SAMPLING)]
        assert server.tries["new"] == 2


def test_a_timeout_is_tried_again_and_then_told():
    def asleep(body, tried):
        time.sleep(1.5 if tried < 2 or "always" in body["messages"][-1]["content"] else 0)
        return echo(body, tried)

    with Server(asleep) as server:
        author = EndpointAuthor(server.url, "m", timeout=0.5, retries=1)
        assert next(iter(author(ASKED[:1], SAMPLING))).text == "re: question 0"
        with pytest.raises(EndpointError, match="timed out"):
            [*author([Request("", "always", "")], SAMPLING)]


@pytest.mark.parametrize(
    "answer, words",
    [
        ((401, {"error": {"message": "wrong key"}}), "wrong key"),
        ((404, {"error": {"message": "no model m"}}), "no model m"),
        ((200, {"error": "?"}), "holds no text"),
        ((200, b"<html>a proxy</html>"), "JSONDecodeError.*is it running"),
    ],
)
def test_what_is_refused_is_told_and_not_tried_again(answer, words):
    with Server(lambda body, tried: answer) as server:
        with pytest.raises(EndpointError, match=words):
            [*EndpointAuthor(server.url, "m")(ASKED[:1], SAMPLING)]
        assert server.tries == {"question 0": 1}


def test_nobody_there():
    with Server(echo) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"Connection.*is it running"):
        [*EndpointAuthor(url, "m", retries=0, timeout=5)(ASKED[:1], SAMPLING)]


def test_settings_that_cannot_be_are_refused():
    for settings in ({"timeout": 0}, {"retries": -1}, {"at_once": 0}):
        with pytest.raises(ConfigError, match="timeout > 0, retries >= 0 and at_once >= 1"):
            EndpointAuthor("http://127.0.0.1:1/v1", "m", **settings)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedrag-jax\[endpoint\]'"):
        EndpointAuthor("http://127.0.0.1:1/v1", "m")


def test_a_reply_without_text_is_read_as_none():
    with Server(lambda body, tried: (200, said(None, "length"))) as server:
        assert [*EndpointAuthor(server.url, "m")(ASKED[:2], SAMPLING)] == 2 * [Reply("", False)]


def test_replies_that_came_before_a_failure_are_kept(tmp_path):
    def fails_late(body, tried):
        return (401, {}) if body["messages"][-1]["content"] == "text 5" else (200, said("9"))

    ask = instruct().rate_text
    about = {str(i): {"text": f"text {i}"} for i in range(8)}
    with Server(fails_late) as server:
        author = EndpointAuthor(server.url, "m", at_once=1)
        with pytest.raises(EndpointError):
            replies(author, ask, about, tmp_path / "r.jsonl", "rate")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1 + 5
