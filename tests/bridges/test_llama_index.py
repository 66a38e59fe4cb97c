"""Systems as parts of LlamaIndex: in its own pipelines they answer as by themselves."""

import asyncio

import numpy as np
import pytest
from bridged import ASKED, PASSAGES, QUESTION, QUESTIONS, SOURCE, ids, rewritten
from llama_index.core import Settings
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.callbacks.schema import EventPayload
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import LongContextReorder, SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import (
    RetrieverQueryEngine,
    RouterQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, QueryBundle
from llama_index.core.tools import QueryEngineTool

from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.integrations import llama_index
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable


def test_nodes_are_the_passages_found(either):
    retriever = llama_index.RAGRetriever(either)
    (expected,) = either.retrieve([QUESTION])
    for nodes in (retriever.retrieve(QUESTION), asyncio.run(retriever.aretrieve(QUESTION))):
        assert ids(nodes) == [f.passage.id for f in expected] and len(nodes) == 3
        assert [n.text for n in nodes] == [f.passage.text for f in expected]
        assert [n.score for n in nodes] == [f.score for f in expected]
        for node, (passage, _) in zip(nodes, expected, strict=True):
            assert node.metadata == {"title": passage.title, "topic": passage.topic}
            read = node.node.get_content(metadata_mode=MetadataMode.LLM)
            assert passage.title in read and "topic" not in read
    retriever.similarity_top_k = 5
    five = [f.passage.id for f in either.retrieve([QUESTION], 5)[0]]
    assert ids(retriever.retrieve(QUESTION)) == five
    assert ids(llama_index.RAGRetriever(either, 5).retrieve(QUESTION)) == five


def test_a_query_is_searched_by_its_own_embedding_or_texts(either):
    retriever, other = llama_index.RAGRetriever(either), QUESTIONS[1]
    vectors = either.retriever.embed_questions([QUESTION, other])
    as_other = QueryBundle(QUESTION, embedding=(3 * vectors[1]).tolist())
    expected = retriever.retrieve(other)
    assert ids(expected) != ids(retriever.retrieve(QUESTION))
    for query in (as_other, QueryBundle(QUESTION, custom_embedding_strs=[other])):
        assert ids(retriever.retrieve(query)) == ids(expected)
        scores = [[n.score for n in nodes] for nodes in (retriever.retrieve(query), expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5)
    both = retriever.retrieve(QueryBundle("", custom_embedding_strs=[QUESTION, other]))
    mean = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    cosines = either.embed(PASSAGES) @ mean
    best = np.argsort(-cosines)[:3]
    assert ids(both) == [PASSAGES[i].id for i in best]
    np.testing.assert_allclose([n.score for n in both], cosines[best], rtol=1e-4)


@pytest.mark.parametrize(
    "query, error, words",
    [
        ({"image_path": "a.png"}, ConfigError, "searched by text, got the image 'a.png'"),
        ({"embedding": [1.0, 2.0]}, ConfigError, r"dimension 2, the system's are of \d+"),
        ({"embedding": [float("nan")] * 64}, DataError, "not finite"),
        ({"custom_embedding_strs": []}, ConfigError, "custom_embedding_strs is empty"),
    ],
)
def test_what_a_query_cannot_ask_for_is_refused(either, query, error, words):
    with pytest.raises(error, match=words):
        llama_index.RAGRetriever(either).retrieve(QueryBundle(QUESTION, **query))


def test_what_cannot_be_honoured_is_refused(system):
    words = BM25Store()
    words.add(PASSAGES)
    by_words = llama_index.RAGRetriever(system.over(words))
    assert SOURCE in ids(by_words.retrieve("Mir Fresco"))
    with pytest.raises(ConfigError, match="'bm25' searches words, and cannot look for the emb"):
        by_words.retrieve(QueryBundle(QUESTION, custom_embedding_strs=["a hypothesis"]))
    retriever, engine = llama_index.RAGRetriever, llama_index.RAGQueryEngine
    with pytest.raises(ConfigError, match="similarity_top_k must be at least 1, got 0"):
        retriever(system, 0)
    with pytest.raises(ConfigError, match="61"):
        retriever(system, 61).retrieve(QUESTION)
    with pytest.raises(TypeError, match="object_map"):
        retriever(system, object_map={})
    with pytest.raises(ConfigError, match="text_qa_template"):
        engine(system, text_qa_template=PromptTemplate("{query_str}"))
    with pytest.raises(ConfigError, match="set it on the retriever"):
        engine(system, similarity_top_k=2, retriever=retriever(system))
    with pytest.raises(ConfigError, match="mode 'ensemble' cannot be streamed"):
        engine(system, mode="ensemble", streaming=True)
    with pytest.raises(ConfigError, match="mode must be one of"):
        engine(system, mode="guess")
    for part in (retriever(system), engine(system)):
        with pytest.raises(ConfigError, match=r"no prompt templates, got .'text_qa_template'"):
            part.update_prompts({"text_qa_template": PromptTemplate("{query_str}")})


def test_the_engine_answers_as_the_system_does(either):
    engine = llama_index.RAGQueryEngine(either)
    for question, answer in ASKED.items():
        expected = either.query(question)
        for response in (engine.query(question), asyncio.run(engine.aquery(question))):
            assert str(response) == expected.answer == answer
            assert ids(response.source_nodes) == [p.id for p in expected.sources]
            assert response.metadata["citations"] == [p.id for p in expected.cited] != []
    whole = llama_index.RAGQueryEngine(either, mode="ensemble").query(QUESTION)
    assert str(whole) == either.query(QUESTION, mode="ensemble").answer
    assert whole.metadata["citations"] == []
    short = llama_index.RAGQueryEngine(either, similarity_top_k=1, max_new_tokens=4)
    assert ids(short.query(QUESTION).source_nodes) == ids(engine.query(QUESTION).source_nodes)[:1]
    assert str(short.query(QUESTION)) != ASKED[QUESTION]


def test_a_stream_joins_to_the_same_answer(either):
    engine = llama_index.RAGQueryEngine(either, streaming=True)
    response = engine.query(QUESTION)
    assert ids(response.source_nodes) == [p.id for p in either.query(QUESTION).sources]
    assert response.metadata == {"citations": None}
    first = next(response.response_gen)
    assert response.metadata == {"citations": [SOURCE]}
    rest = [*response.response_gen]
    assert rest and first + "".join(rest) == ASKED[QUESTION]

    async def ask():
        response = await engine.aquery(QUESTION)
        return [piece async for piece in response.async_response_gen()], response

    pieces, response = asyncio.run(ask())
    assert pieces == [first, *rest] and response.metadata == {"citations": [SOURCE]}


class Rewrites(BaseNodePostprocessor):
    def _postprocess_nodes(self, nodes, query_bundle=None):
        for node in nodes:
            node.node.set_content(rewritten(node.text))
        return nodes


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_are_read_from_the_nodes_that_are_left(either, streaming):
    def ask(*steps, awaited=False):
        engine = llama_index.RAGQueryEngine(
            either, node_postprocessors=steps, streaming=streaming, callback_manager=manager
        )

        async def answer():
            response = await engine.aquery(QUESTION)
            return await response.get_response() if streaming else response

        if awaited:
            return asyncio.run(answer())
        response = engine.query(QUESTION)
        return response.get_response() if streaming else response

    manager = CallbackManager([])
    step, plain = Rewrites(), ask()
    for response in (ask(step), ask(step, awaited=True)):
        assert str(response) == "Got Muk" != str(plain)
        assert response.metadata["citations"] == [SOURCE]
    assert step.callback_manager is manager
    assert str(ask()) == str(plain)  # the passages themselves are as they were
    turned = ask(LongContextReorder())
    assert sorted(ids(turned.source_nodes)) == sorted(ids(plain.source_nodes))
    assert ids(turned.source_nodes) != ids(plain.source_nodes)
    assert turned.metadata["citations"] == [SOURCE]  # the source, and not its former number
    none = ask(SimilarityPostprocessor(similarity_cutoff=1.1))
    assert none.source_nodes == []
    assert none.response == either.read([QUESTION], [[]])[0].answer


def test_an_engine_reads_what_others_retrieve(system):
    """Our retriever in their fusion, and the nodes of the fusion before our generator."""
    words = BM25Store()
    words.add(PASSAGES)
    parts = [llama_index.RAGRetriever(s) for s in (system, system.over(words))]
    fusion = QueryFusionRetriever(
        parts, llm=MockLLM(), num_queries=1, mode="reciprocal_rerank", similarity_top_k=4
    )
    found = [ids(part.retrieve(QUESTION)) for part in parts]
    several = {*found[0], *found[1]}
    ranks = {i: sum(1 / (60 + some.index(i)) for some in found if i in some) for i in several}
    engine = llama_index.RAGQueryEngine(system, retriever=fusion)
    for response in (engine.query(QUESTION), asyncio.run(engine.aquery(QUESTION))):
        assert [n.score for n in response.source_nodes] == sorted(ranks.values())[::-1][:4]
        assert {*ids(response.source_nodes)} <= {*ranks}
        assert str(response) == ASKED[QUESTION] and response.metadata["citations"] == [SOURCE]


def test_their_synthesizer_reads_our_nodes(either):
    engine = RetrieverQueryEngine.from_args(
        llama_index.RAGRetriever(either),
        llm=MockLLM(),  # says its prompt
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=-1)],
    )
    response, sources = engine.query(QUESTION), either.query(QUESTION).sources
    assert ids(response.source_nodes) == [p.id for p in sources]
    places = [str(response).index(p.text) for p in sources]
    assert places == sorted(places) and QUESTION in str(response)


class ByTopic(BaseSelector):
    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        raise AssertionError("there are none")

    def _select(self, choices, query):
        (index,) = [i for i, c in enumerate(choices) if c.description in query.query_str]
        return SelectorResult(selections=[SingleSelection(index=index, reason="named")])

    async def _aselect(self, choices, query):
        return self._select(choices, query)


def test_engines_under_routers_transforms_and_chats(system, over):
    engine = llama_index.RAGQueryEngine(system)
    tools = [
        QueryEngineTool.from_defaults(e, name=name, description=name)
        for name, e in (("Fresco", engine), ("Bris", llama_index.RAGQueryEngine(over)))
    ]
    router = RouterQueryEngine(ByTopic(), tools, llm=MockLLM())
    assert str(router.query(QUESTIONS[0])) == ASKED[QUESTIONS[0]]
    assert not hasattr(over.store, "searches")
    assert str(asyncio.run(router.aquery(QUESTIONS[1]))) == ASKED[QUESTIONS[1]]
    assert over.store.searches == [1]
    transform = HyDEQueryTransform(llm=MockLLM())
    asked = transform.run(QUESTION)
    hyde = TransformQueryEngine(engine, transform).query(QUESTION)
    vector = system.retriever.embed_questions(asked.custom_embedding_strs).mean(0)
    best = np.argsort(-(system.embed(PASSAGES) @ vector))[:3]
    assert ids(hyde.source_nodes) == [PASSAGES[i].id for i in best]
    chat = CondenseQuestionChatEngine.from_defaults(engine, llm=MockLLM())
    assert str(chat.chat(QUESTION)) == ASKED[QUESTION]
    streamed = llama_index.RAGQueryEngine(system, streaming=True)
    chat = CondenseQuestionChatEngine.from_defaults(streamed, llm=MockLLM())
    assert "".join(chat.stream_chat(QUESTION).response_gen).strip() == ASKED[QUESTION]


def test_their_evaluator_knows_passages_by_their_ids(system):
    retriever = llama_index.RAGRetriever(system, 5)
    evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)
    found = ids(retriever.retrieve(QUESTION))
    metrics = evaluator.evaluate(QUESTION, [found[1]]).metric_vals_dict
    assert metrics == {"hit_rate": 1.0, "mrr": 0.5}
    assert evaluator.evaluate(QUESTION, ["nowhere"]).metric_vals_dict["hit_rate"] == 0


class Hears(BaseEventHandler):
    heard: list

    def handle(self, event, **kwargs):
        self.heard.append(event.class_name())


def test_listeners_hear_queries_retrieval_synthesis_and_faults(over):
    debug, hears = LlamaDebugHandler(print_trace_on_end=False), Hears(heard=[])
    engine = llama_index.RAGQueryEngine(over, callback_manager=CallbackManager([debug]))
    root = get_dispatcher()
    root.add_event_handler(hears)
    try:
        engine.query(QUESTION)
        asyncio.run(engine.aquery(QUESTION))
    finally:
        root.event_handlers.remove(hears)
    for kind in (CBEventType.QUERY, CBEventType.RETRIEVE, CBEventType.SYNTHESIZE):
        started, ended = zip(*debug.get_event_pairs(kind), strict=True)
        assert len(started) == 2, kind
        assert {e.payload[EventPayload.QUERY_STR] for e in started} == {QUESTION}
    assert str(ended[0].payload[EventPayload.RESPONSE]) == ASKED[QUESTION]
    expected = ["Query", "Retrieval", "Synthesize"]
    one = [f"{expected[0]}StartEvent", *(f"{e}{when}Event" for e in expected[1:]
           for when in ("Start", "End")), f"{expected[0]}EndEvent"]  # fmt: skip
    assert hears.heard == 2 * one
    over.store.away = True
    for ask in (engine.query, lambda q: asyncio.run(engine.aquery(q))):
        with pytest.raises(StoreUnreachable, match="the store is away"):
            ask(QUESTION)
        *_, (_, ended) = debug.get_event_pairs(CBEventType.RETRIEVE)
        assert isinstance(ended.payload[EventPayload.EXCEPTION], StoreUnreachable)


def test_no_language_model_of_theirs_is_looked_for(system, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_embed_model", None)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([debug]))
    llama_index.RAGQueryEngine(system).query(QUESTION)
    assert Settings._llm is None and Settings._embed_model is None
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 1  # heard by the settings' manager
