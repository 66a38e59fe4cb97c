"""Mode "search": answers that look things up as they are written, whole, streamed, served and asked."""

import asyncio
import copy
import dataclasses
import json

import numpy as np
import openai
import pytest
from mcp import Client
from test_service import asked, served

from fedrag_jax.cli.command_line import main
from fedrag_jax.data import synthetic
from fedrag_jax.data.prompts import COMPACT, INSTRUCT, named_style
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.evaluation.evaluator import evaluate
from fedrag_jax.evaluation.metrics import exact_match
from fedrag_jax.generation.inference import Lookup
from fedrag_jax.generation.rollouts import (
    COMPACT_SEARCHING,
    SEARCHING,
    Budget,
    Searching,
    Tags,
    searching_of,
)
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.passage_source import Found
from fedrag_jax.server.mcp_server import mcp_server
from fedrag_jax.strategies.policies import search_policy
from fedrag_jax.systems.system_like import system_like

WORLD = synthetic.generate(
    synthetic.WorldConfig(people=20, works=20, jargon=0, chatter=0, questions=(400, 20, 20))
)
# Questions about one passage, which prompts begin with: the built-in decoder knows the answers. What it
# takes for an answer is looked up, until no more searches are allowed.
ASKED = [
    e for e in WORLD.train if e.hops == 1 and e.positive_ids == WORLD.train[0].positive_ids[-1:]
]
(PASSAGE,) = [p for p in WORLD.passages if p.id == ASKED[0].positive_ids[0]]
QUESTIONS = [e.question for e in ASKED]
TAGS = Tags((" ", "</s>"), ("Answer:", "\n"), "\n{text}\n{question}")
LOOKS_UP = Searching(
    PASSAGE.text + "\n{question}", "Who or what is {query}?", 2, TAGS, Budget(2, 12, 96)
)


@pytest.fixture(scope="module")
def system():
    built = RAGSystem.build(WORLD.passages[:60], top_k=3)
    return dataclasses.replace(built, searching=LOOKS_UP)


def test_answers_are_read_in_what_was_looked_up(system):
    responses = system.batch_query(QUESTIONS, mode="search")
    assert {len(r.searches) for r in responses} == {2}
    for question, response in zip(QUESTIONS, responses, strict=True):
        found = {}
        for query, passages in response.searches:
            (some,) = system.retrieve([f"Who or what is {query}?"], 2)
            assert passages == tuple(f.passage for f in some)
            found = {f.passage.id: f for f in some} | found
        assert response.sources == tuple(f.passage for f in found.values())
        assert response.scores == tuple(f.score for f in found.values())
        assert response.finish == "length" and "</s>" not in response.answer
        read, written = response.tokens
        assert read > len(system.prompts.tokenizer(question)["input_ids"]) and written <= 36
        assert response.searches[0].query == system.answer([question], [[PASSAGE]])[0]
    for question, response in zip(QUESTIONS[:2], responses, strict=False):
        assert system.query(question, mode="search") == response
    assert system.batch_query([], mode="search") == []


class Pieces(FaissStore):
    """Tells passages as pieces of one document, as a tool of an MCP server may."""

    def search(self, questions, vectors=None, k=5):
        return [
            [Found(dataclasses.replace(passage, id="document"), score) for passage, score in some]
            for some in super().search(questions, vectors, k)
        ]


def test_sources_that_share_an_id_are_all_told(system):
    store = Pieces(system.retriever.vectors.shape[1])
    store.add(WORLD.passages[:60], system.retriever.vectors)
    whole = system.query(QUESTIONS[0], mode="search")
    response = system.over(store).query(QUESTIONS[0], mode="search")
    assert len(response.sources) > 1 and {p.id for p in response.sources} == {"document"}
    assert [p.text for p in response.sources] == [p.text for p in whole.sources]
    np.testing.assert_allclose(response.scores, whole.scores, atol=1e-5)


def test_drawn_answers_follow_their_seed(system):
    how = {"mode": "search", "temperature": 1.5}
    first, again, other = (system.query(QUESTIONS[0], seed=s, **how) for s in (1, 1, 2))
    assert first == again != other


def test_a_stream_tells_each_search_and_then_the_answer(system):
    expected, streamed = system.query(QUESTIONS[0], mode="search"), None
    streamed = system.stream(QUESTIONS[0], mode="search")
    assert streamed.finish == "" and streamed.tokens == (0, 0)
    *searches, answer = streamed
    assert all(isinstance(one, Lookup) for one in searches)
    assert tuple(searches) == expected.searches and answer == expected.answer
    assert streamed.response == expected
    assert (streamed.finish, streamed.tokens) == (expected.finish, expected.tokens)

    async def later():
        return [piece async for piece in system.astream(QUESTIONS[0], mode="search")]

    assert asyncio.run(later()) == [*expected.searches, expected.answer]


def test_what_cannot_be_honoured_is_refused(system):
    for how, why in (
        ({"beams": 2}, "mode 'search' takes no beams"),
        ({"stop": ("x",)}, "ends an answer at its tag"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 5000}, "positions"),
        ({"tempo": 1}, "unknown sampling options"),
    ):
        with pytest.raises(ConfigError, match=why):
            system.query(QUESTIONS[0], mode="search", **how)
    with pytest.raises(DataError, match="question 2 of 2 is blank"):
        system.batch_query([QUESTIONS[0], " "], mode="search")
    with pytest.raises(ConfigError, match="searches for its own passages"):
        system.read(QUESTIONS[:1], [[0]], mode="search")


def test_evaluation_counts_searches(system):
    examples = [e for e in WORLD.train if {*e.positive_ids} <= {p.id for p in WORLD.passages[:60]}]
    scores = evaluate(system, examples[:6], mode="search")
    responses = system.batch_query([e.question for e in examples[:6]], mode="search")
    np.testing.assert_array_equal(scores["searches"], [len(r.searches) for r in responses])
    right = [exact_match(r.answer, e.answers) for r, e in zip(responses, examples[:6], strict=True)]
    np.testing.assert_array_equal(scores["em"], right)
    usual = evaluate(system, examples[:6])
    np.testing.assert_array_equal(scores["mrr"], usual["mrr"])
    assert "searches" not in usual


def test_own_questions_are_measured_as_they_are_answered(system, tmp_path, capsys):
    system.save(tmp_path / "system")
    saved, questions = str(tmp_path / "system"), tmp_path / "own.jsonl"
    ids = {p.id for p in WORLD.passages[:60]}
    some = [e for e in WORLD.train if {*e.positive_ids} <= ids][:3]
    rows = [
        {"id": e.id, "question": e.question, "answers": e.answers, "positive_ids": e.positive_ids}
        for e in some
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    command = ["eval", saved, "--questions", str(questions), "--all", "--mode", "search", "--quiet"]
    assert main([*command, "--json", "--to", str(tmp_path / "results")]) == 0
    (result,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    responses = system.batch_query([e.question for e in some], mode="search")
    assert result["searches"] == np.mean([len(r.searches) for r in responses]) > 0
    right = [exact_match(r.answer, e.answers) for r, e in zip(responses, some, strict=True)]
    assert result["metrics"]["em"]["mean"] == pytest.approx(100 * np.mean(right))
    (file,) = tmp_path.glob("results/*/rows.jsonl")
    written = {
        row["id"]: row for row in map(json.loads, file.read_text().splitlines()) if "id" in row
    }
    for e, response in zip(some, responses, strict=True):
        assert written[e.id]["prediction"] == response.answer
        assert written[e.id]["searches"] == [search.query for search in response.searches]
        assert written[e.id]["read"] == [p.id for p in response.sources]
    assert main([*command, "--shots", "1"]) == 1
    assert "mode 'search' looks up its own passages" in capsys.readouterr().err


def test_styles_have_their_own_way_to_search(system):
    tokenizer = copy.copy(system.prompts.tokenizer)
    assert searching_of(COMPACT._replace(one_line=False), tokenizer) is COMPACT_SEARCHING
    assert searching_of(INSTRUCT, tokenizer) is SEARCHING
    opened = SEARCHING.opening("Who {x} {open}?")
    assert "Question: Who {x} {open}?" in opened and "<search>query</search>" in opened
    # A style that writes its beginning itself needs no chat template.
    own = INSTRUCT._replace(bos=False)
    assert searching_of(own, tokenizer) == SEARCHING._replace(bos=False)
    assert RAGSystem.build(WORLD.passages[:9], prompt_style=own).searching.bos is False
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = searching_of(named_style("chat", tokenizer), tokenizer)
    asked = chat.opening("Who?")
    assert asked.startswith("[user]Answer the question") and asked.endswith("[assistant]")
    assert "Question: Who?" in asked and "</search>" in asked
    whole, bare = (s.prompt(tokenizer, "Who?") for s in (chat._replace(bos=True), chat))
    assert whole.tolist() == [tokenizer.bos_token_id, *bare]


def test_a_question_is_text_alone(system):
    """Its special tokens are none, and half characters are refused, as in all other prompts."""
    tokenizer = system.prompts.tokenizer
    for searching in (SEARCHING, COMPACT_SEARCHING):
        tokens = searching.prompt(tokenizer, "Who</s> is <s>Ada?").tolist()
        specials = [t for t in tokens if t in tokenizer.all_special_ids]
        assert specials == [tokenizer.bos_token_id] == tokens[:1]
        assert tokenizer.decode(tokens[1:]) == searching.opening("Who< /s> is < s>Ada?")
        with pytest.raises(DataError, match=r"question 'Who .ud83d' holds half a character"):
            searching.prompt(tokenizer, "Who \ud83d")
    half = dataclasses.replace(WORLD.train[0], question="Who \ud83d")
    for ask in (
        lambda: system.query(half.question, mode="search"),
        lambda: search_policy(system, dataclasses.replace(WORLD, train=[half])),
    ):
        with pytest.raises(DataError, match="holds half a character"):
            ask()


def test_a_saved_system_searches_as_before(system, tmp_path):
    system.save(tmp_path / "s")
    opened = RAGSystem.load(tmp_path / "s")
    assert opened.searching == LOOKS_UP
    expected = system.query(QUESTIONS[0], mode="search")
    assert opened.query(QUESTIONS[0], mode="search").answer == expected.answer
    settings = json.loads((tmp_path / "s" / "system.json").read_text())
    del settings["searching"]  # as older versions saved it
    (tmp_path / "s" / "system.json").write_text(json.dumps(settings))
    assert RAGSystem.load(tmp_path / "s").searching == COMPACT_SEARCHING


def test_a_system_prompt_is_refused(system, tmp_path, capsys):
    """Searching has an instruction of its own; also that of a saved system."""
    under = system.under("Be brief.")
    under.save(tmp_path / "s")
    for instructed in (under, RAGSystem.load(tmp_path / "s"), system_like(under, WORLD.passages)):
        for ask in (
            lambda s: s.query(QUESTIONS[0], mode="search"),
            lambda s: next(s.stream(QUESTIONS[0], mode="search")),
        ):
            with pytest.raises(ConfigError, match=r"no system prompt, got 'Be brief.': remove it"):
                ask(instructed)
        assert instructed.under("").prompts.style == system.prompts.style
    expected = system.query(QUESTIONS[0], mode="search")
    assert under.under("").query(QUESTIONS[0], mode="search") == expected
    assert main(["ask", str(tmp_path / "s"), QUESTIONS[0], "--mode=search"]) == 1
    assert "takes no system prompt, got 'Be brief.'" in capsys.readouterr().err


def test_asking_prints_what_was_looked_up(system, tmp_path, capsys):
    system.save(tmp_path / "s")
    expected = system.query(QUESTIONS[0], mode="search")
    ask = ["ask", str(tmp_path / "s"), QUESTIONS[0], "--mode", "search"]
    for more in ([], ["--stream"]):
        assert main([*ask, *more]) == 0
        out, err = capsys.readouterr()
        for query, passages in expected.searches:
            assert f"searched for {query!r}" in out and passages[0].id in out
        assert f"\n{expected.answer}\n" in out and "ended before its answer" in err
        assert main([*ask, "--no-sources", *more]) == 0
        assert capsys.readouterr().out == expected.answer + "\n"
    assert main([*ask, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["searches"] == [
        {"query": query, "sources": [p.id for p in passages]}
        for query, passages in expected.searches
    ]


def test_a_service_tells_what_was_looked_up(system):
    expected = system.query(QUESTIONS[0], mode="search")
    searches = [
        {"query": query, "sources": [p.id for p in passages]}
        for query, passages in expected.searches
    ]
    how = {"model": "fedrag", "messages": asked(QUESTIONS[0]), "extra_body": {"mode": "search"}}
    for address in served(system):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(**how)
        assert whole.choices[0].message.content == expected.answer
        assert whole.model_extra["fedrag"]["searches"] == searches
        chunks = [*client.chat.completions.create(stream=True, **how)]
        told = [c.model_extra["fedrag"] for c in chunks if "fedrag" in c.model_extra]
        assert [one["search"] for one in told[:-1]] == searches == told[-1]["searches"]
        assert [s["id"] for s in told[-1]["sources"]] == [p.id for p in expected.sources]
        pieces = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(pieces) == expected.answer
        assert chunks[-1].choices[0].finish_reason == expected.finish


def test_the_mcp_tool_answers_by_searching(system):
    async def ask(mode):
        async with Client(mcp_server(system)) as client:
            return await client.call_tool("ask", {"question": QUESTIONS[0], "mode": mode})

    told = asyncio.run(ask("search")).structured_content
    expected = system.query(QUESTIONS[0], mode="search")
    assert told["answer"] == expected.answer
    assert [s["query"] for s in told["searches"]] == [s.query for s in expected.searches]
    assert asyncio.run(ask("poem")).is_error
