"""Systems as parts of LlamaIndex and LangChain: in their own pipelines they answer as by themselves."""

import asyncio
import importlib
import subprocess
import sys
from operator import attrgetter

import numpy as np
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
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

from fedrag_jax.data import synthetic
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.integrations import langchain, llama_index
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.bm25 import BM25Store
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable

WORLD = synthetic.generate(synthetic.WorldConfig())
PASSAGES = WORLD.passages[:60]
ASKED = {  # questions, and what the built-in reader answers with a citation
    "By whom was the Mir Fresco painted?": "Bro Pal",
    "In which city was Bris Rat born?": "Kisrom",
    "What is the year in which the Bot Serial was directed?": "1584",
}
QUESTIONS = [*ASKED]
QUESTION = QUESTIONS[0]
SOURCE = "painting-work-19"


class Counting(FaissStore):
    """A store that counts the questions of each search, and is away when it is told to be."""

    def search(self, questions, vectors=None, k=5):
        self.searches = [*getattr(self, "searches", ()), len(questions)]
        if getattr(self, "away", False):
            raise StoreUnreachable("the store is away: start it")
        return super().search(questions, vectors, k)


@pytest.fixture(scope="module")
def system():
    return RAGSystem.build(
        PASSAGES, generator="builtin:citing", prompt_style="compact_cited", top_k=3
    )


@pytest.fixture
def over(system):
    store = Counting(system.retriever.vectors.shape[1])
    store.add(PASSAGES, system.embed(PASSAGES))
    return system.over(store)


@pytest.fixture(params=["corpus", "store"])
def either(request, system):
    return system if request.param == "corpus" else request.getfixturevalue("over")


def ids(nodes):
    return [n.node_id for n in nodes]


def rewritten(text):
    return text.replace("Bro Pal", "Got Muk")


# --- LlamaIndex ----------------------------------------------------------------------------------


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


def test_a_blank_question_is_refused_by_both_bridges(either):
    blank = pytest.raises(DataError, match="question 1 of 1 is blank: ask something")
    nodes = llama_index.RAGRetriever(either).retrieve(QUESTION)
    for ask in (
        lambda: llama_index.RAGRetriever(either).retrieve(" "),
        lambda: llama_index.RAGQueryEngine(either).query(" "),
        lambda: llama_index.RAGQueryEngine(either).synthesize(QueryBundle(" "), nodes),
        lambda: langchain.RAGRetriever(system=either).invoke(""),
        lambda: langchain.RAGRunnable(system=either).invoke(" "),
        lambda: [*langchain.RAGRunnable(system=either).stream({"question": " ", "context": []})],
    ):
        with blank:
            ask()
    found = langchain.RAGRunnable(system=either).batch([QUESTION, " "], return_exceptions=True)
    assert found[0]["answer"] and isinstance(found[1], DataError)


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


# --- LangChain -----------------------------------------------------------------------------------


class Records(BaseCallbackHandler):
    """What a handler hears: (event, what it is about), and the settings of what started."""

    def __init__(self):
        self.heard, self.settings = [], []

    def _starts(self, kind, said, tags, metadata, name):
        self.heard.append((f"{kind} starts", said))
        self.settings.append((name, tags, metadata))

    def on_retriever_start(self, serialized, query, *, tags, metadata, name, **kwargs):
        self._starts("retriever", query, tags, metadata, name)

    def on_chain_start(self, serialized, inputs, *, tags, metadata, name, **kwargs):
        self._starts("chain", str(inputs), tags, metadata, name)

    def on_retriever_end(self, documents, **kwargs):
        self.heard.append(("retriever ends", documents[0].id))

    def on_chain_end(self, outputs, **kwargs):
        self.heard.append(("chain ends", outputs["answer"]))

    def on_retriever_error(self, error, **kwargs):
        self.heard.append(("retriever fails", type(error)))

    def on_chain_error(self, error, **kwargs):
        self.heard.append(("chain fails", type(error)))


def in_batches(runnable, inputs, **how):
    """By `batch`, and by its twin that waits."""
    yield runnable.batch(inputs, **how)
    yield asyncio.run(runnable.abatch(inputs, **how))


def rounded(value):
    """Results to compare: scores of one question and of many differ in their last bits."""
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, Document):
        score = pytest.approx(value.metadata["score"], rel=1e-5)
        return value.id, value.page_content, value.metadata | {"score": score}
    return value


def test_documents_are_the_passages_found(either):
    retriever = langchain.RAGRetriever(system=either)
    (expected,) = either.retrieve([QUESTION])
    documents = retriever.invoke(QUESTION)
    assert [d.id for d in documents] == [f.passage.id for f in expected]
    for document, (passage, score) in zip(documents, expected, strict=True):
        assert document.page_content == passage.text
        assert document.metadata == {
            "title": passage.title, "topic": passage.topic, "score": score,
        }  # fmt: skip
    assert asyncio.run(retriever.ainvoke(QUESTION)) == documents
    assert [*retriever.stream(QUESTION)] == [documents]
    five = langchain.RAGRetriever(system=either, k=5).invoke(QUESTION)
    assert len(five) == 5 and five[:3] == documents
    assert retriever.invoke(QUESTION, k=5) == retriever.bind(k=5).invoke(QUESTION) == five
    assert asyncio.run(retriever.ainvoke(QUESTION, k=5)) == five
    for found in in_batches(retriever, [QUESTION], k=5):
        assert found == [five]


def test_a_batch_of_questions_is_one_search(over):
    retriever = langchain.RAGRetriever(system=over)
    expected = [retriever.invoke(question) for question in QUESTIONS]
    over.store.searches = []
    for found in in_batches(retriever, QUESTIONS):
        assert rounded(found) == rounded(expected)
    assert over.store.searches == [3, 3]
    assert retriever.batch([]) == []


def test_what_a_call_cannot_have_is_refused_there_too(system):
    for wrong in ({"search_kwargs": {"k": 3}}, {"top_k": 3}, {"k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            langchain.RAGRetriever(system=system, **wrong)
    for kind in (langchain.RAGRetriever, langchain.RAGRunnable):
        with pytest.raises(ValueError, match="system must be a RAGSystem, got a str"):
            kind(system="a system")
        assert "Array" not in repr(kind(system=system))
    retriever, answers = (
        langchain.RAGRetriever(system=system), langchain.RAGRunnable(system=system),
    )  # fmt: skip
    for call in (retriever.invoke, lambda q, **how: retriever.batch([q], **how)):
        with pytest.raises(TypeError, match="filter"):
            call(QUESTION, filter={"topic": "painting"})
        with pytest.raises(ConfigError, match="61"):
            call(QUESTION, k=61)
    with pytest.raises(ConfigError, match="k"):
        answers.invoke(QUESTION, k=3)
    for wrong, words in (
        ({"query": "?"}, "needs a question as 'question' or 'input'.* of .'query'."),
        ({"question": "?", "input": "!"}, "no other as both"),
        (7, "a question must be a string, or a dict with one, got 7"),
        ({"input": "?", "context": "a text"}, "must be a list of documents, got str"),
    ):
        with pytest.raises(ConfigError, match=words):
            answers.invoke(wrong)
    with pytest.raises(ConfigError, match="a retriever is asked a string, got"):
        retriever.invoke({"input": QUESTION})
    with pytest.raises(ConfigError, match="takes no beams"):
        [*answers.stream(QUESTION, mode="ensemble", beams=2)]


def test_the_runnable_answers_as_the_system_does(either):
    runnable, ids_of = langchain.RAGRunnable(system=either), attrgetter("id")
    for question, answer in ASKED.items():
        expected, given = either.query(question), runnable.invoke(question)
        assert [*given] == ["question", "answer", "context", "cited"]
        assert given["question"] == question and given["answer"] == expected.answer == answer
        assert [*map(ids_of, given["context"])] == [*map(ids_of, expected.sources)]
        assert [*map(ids_of, given["cited"])] == [*map(ids_of, expected.cited)] != []
        assert runnable.invoke({"question": question}) == runnable.invoke({"input": question})
        assert asyncio.run(runnable.ainvoke({"input": question, "session": 7})) == given
    ensemble = runnable.bind(mode="ensemble")
    assert ensemble.invoke(QUESTION)["answer"] == either.query(QUESTION, mode="ensemble").answer
    assert ensemble.invoke(QUESTION)["cited"] == []
    assert [*ensemble.stream(QUESTION)] == [ensemble.invoke(QUESTION)]
    short = runnable.bind(max_new_tokens=4)
    assert short.invoke(QUESTION)["answer"] != ASKED[QUESTION]
    assert sum_of(short.stream(QUESTION)) == short.invoke(QUESTION)
    assert runnable.bind(stop=["Pal"]).invoke(QUESTION)["answer"] == "Bro"


def sum_of(parts):
    first, *rest = parts
    return sum(rest, first)


def test_streamed_parts_add_up_to_the_answer(either):
    runnable = langchain.RAGRunnable(system=either)

    async def ask(chain):
        return [part async for part in chain.astream(QUESTION)]

    for parts in ([*runnable.stream(QUESTION)], asyncio.run(ask(runnable))):
        assert [[*part] for part in parts[:1]] == [["question", "context"]]
        assert len([part for part in parts if "answer" in part]) > 1
        assert sum_of(parts) == runnable.invoke(QUESTION)
    words = runnable.pick("answer") | StrOutputParser()
    pieces = [*words.stream(QUESTION)]
    assert len(pieces) > 1 and "".join(pieces) == ASKED[QUESTION]
    assert asyncio.run(ask(words)) == pieces
    nothing = runnable.bind(stop=["B"])
    assert sum_of(nothing.stream(QUESTION)) == nothing.invoke(QUESTION)
    assert nothing.invoke(QUESTION)["answer"] == ""


def test_a_batch_of_answers_is_one_search_and_equals_each(over):
    runnable = langchain.RAGRunnable(system=over)
    expected = [runnable.invoke(question) for question in QUESTIONS]
    over.store.searches = []
    for answers in in_batches(runnable, QUESTIONS):
        assert rounded(answers) == rounded(expected)
    assert over.store.searches == [3, 3]
    # What brings its context is not searched for.
    own = {"question": QUESTION, "context": expected[0]["context"][::-1]}
    for mixed in in_batches(runnable, [own, QUESTIONS[1]]):
        assert mixed[0]["context"] == own["context"]
        assert mixed[0]["answer"] == ASKED[QUESTION] and mixed[0]["cited"] == expected[0]["cited"]
        assert rounded(mixed[1]) == rounded(expected[1])
    assert over.store.searches == [3, 3, 1, 1]


def test_one_bad_question_spoils_no_other(over):
    bad = {"query": "?"}
    for kind, wrong in ((langchain.RAGRetriever, 7), (langchain.RAGRunnable, bad)):
        part, records = kind(system=over), Records()
        config = {"callbacks": [records]}
        for results in in_batches(
            part, [QUESTION, wrong, QUESTIONS[1]], return_exceptions=True, config=config
        ):
            assert rounded(results[::2]) == rounded(part.batch(QUESTIONS[:2]))
            assert isinstance(results[1], ConfigError)
        happened = [event.split()[1] for event, _ in records.heard]
        assert happened == 2 * (3 * ["starts"] + ["ends", "fails", "ends"])
        with pytest.raises(ConfigError, match="string"):
            kind(system=over).batch([QUESTION, 7])


def test_pipelines_of_theirs(either):
    retriever = langchain.RAGRetriever(system=either)
    answers = langchain.RAGRunnable(system=either)
    sources = [p.text for p in either.query(QUESTION).sources]

    def shown(documents):
        return "\n\n".join(d.page_content for d in documents)

    seen = []
    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    heard = RunnableLambda(lambda value: seen.append(value) or value)
    context = {"context": retriever | shown, "question": RunnablePassthrough()}
    model = FakeListChatModel(responses=["read"])
    chain = context | prompt | heard | model | StrOutputParser()
    assert chain.invoke(QUESTION) == "read"
    assert seen[0].to_string().endswith("\n\n".join([*sources, QUESTION]))
    assert chain.batch(QUESTIONS) == 3 * ["read"]
    # Documents that something else has changed are what our generator reads.
    changed = RunnableLambda(
        lambda documents: [
            d.model_copy(update={"page_content": rewritten(d.page_content)}) for d in documents
        ]
    )
    reread = {"context": retriever | changed, "question": RunnablePassthrough()} | answers
    assert reread.invoke(QUESTION)["answer"] == "Got Muk" != ASKED[QUESTION]
    assert [d.id for d in reread.invoke(QUESTION)["cited"]] == [SOURCE]
    assert "".join(reread.pick("answer").stream(QUESTION)) == "Got Muk"
    both = RunnableParallel(ours=answers.pick("answer"), theirs=chain)
    assert both.invoke(QUESTION) == {"ours": ASKED[QUESTION], "theirs": "read"}
    kept = RunnablePassthrough.assign(given=answers | (lambda answer: answer["answer"]))
    asked = {"input": QUESTION, "session": 7}
    assert kept.invoke(asked) == asked | {"given": ASKED[QUESTION]}
    tool = create_retriever_tool(retriever, "search", "Finds passages.")
    assert tool.invoke({"query": QUESTION}) == "\n\n".join(sources)
    assert reread.get_graph().draw_mermaid() and answers.get_input_jsonschema()


def test_handlers_hear_every_run_with_its_settings(either):
    config = {"tags": ["a"], "metadata": {"b": 1}, "run_name": "c"}
    retriever = langchain.RAGRetriever(system=either, tags=["own"], metadata={"owner": "o"})
    (first, second) = (either.retrieve([q])[0][0].passage.id for q in QUESTIONS[:2])
    asked = [("retriever starts", q) for q in QUESTIONS[:2]]
    for ask, heard in (
        (lambda c: retriever.invoke(QUESTION, c), [asked[0], ("retriever ends", first)]),
        (
            lambda c: retriever.batch(QUESTIONS[:2], c),
            [*asked, ("retriever ends", first), ("retriever ends", second)],
        ),
    ):
        records = Records()
        ask(config | {"callbacks": [records]})
        assert records.heard == heard
        for name, tags, metadata in records.settings:
            assert name == "c" and sorted(tags) == ["a", "own"]
            assert metadata["b"] == 1 and metadata["owner"] == "o"
            assert metadata["ls_retriever_name"] == "rag"
    runnable = langchain.RAGRunnable(system=either)
    for ask in (
        lambda r: r.invoke(QUESTION),
        lambda r: asyncio.run(r.ainvoke(QUESTION)),
        lambda r: r.batch([QUESTION]),
        lambda r: asyncio.run(r.abatch([QUESTION])),
        lambda r: [*r.stream(QUESTION)],
    ):
        records = Records()
        ask(runnable.with_config(config | {"callbacks": [records]}))
        assert [event for event, _ in records.heard] == ["chain starts", "chain ends"]
        assert records.heard[-1] == ("chain ends", ASKED[QUESTION])
        ((name, tags, metadata),) = records.settings
        assert (name, tags, metadata["b"]) == ("c", ["a"], 1)


def test_faults_reach_the_caller_and_the_handlers(over):
    over.store.away = True
    retriever = langchain.RAGRetriever(system=over)
    runnable = langchain.RAGRunnable(system=over)
    for part, kind in ((retriever, "retriever"), (runnable, "chain")):
        for ask in (
            part.invoke,
            lambda q, c, part=part: asyncio.run(part.ainvoke(q, c)),
            lambda q, c, part=part: part.batch([q], c),
            lambda q, c, part=part: asyncio.run(part.abatch([q], c)),
            lambda q, c, part=part: [*part.stream(q, c)],
        ):
            records = Records()
            with pytest.raises(StoreUnreachable, match="the store is away"):
                ask(QUESTION, {"callbacks": [records]})
            assert records.heard[-1] == (f"{kind} fails", StoreUnreachable), ask
        over.store.searches = []
        faults = part.batch(QUESTIONS, return_exceptions=True)
        assert [type(fault) for fault in faults] == 3 * [StoreUnreachable]
        assert over.store.searches == [3]  # what is away is not asked again for each
    answer = runnable.with_fallbacks([RunnableLambda(lambda _: {"answer": "later"})])
    assert answer.invoke(QUESTION) == {"answer": "later"}


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, library, extra",
    [
        ("llama_index", "llama_index", "llama-index"),
        ("langchain", "langchain_core", "langchain"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, module, library, extra):
    for name in [*sys.modules]:
        if name.split(".")[0] == library:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fedrag_jax.integrations.{module}")
    with pytest.raises(ConfigError, match=rf"pip install 'fedrag-jax\[{extra}\]'"):
        importlib.import_module(f"fedrag_jax.integrations.{module}")


def test_the_package_imports_neither():
    code = (
        "import sys, fedrag_jax.integrations; "
        "assert not {'llama_index', 'langchain_core', 'jax'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
