"""Systems as parts of LangChain: in its own pipelines they answer as by themselves."""

import asyncio
from operator import attrgetter

import pytest
from bridged import ASKED, QUESTION, QUESTIONS, SOURCE, rewritten
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import create_retriever_tool

from fedrag_jax.errors import ConfigError
from fedrag_jax.integrations import langchain
from fedrag_jax.retrieval.stores.knowledge_store import StoreUnreachable


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
    with pytest.raises(ConfigError, match="a retriever takes a string, got"):
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
