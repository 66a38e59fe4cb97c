"""LangChain components of a RAG system: a retriever, and a Runnable that answers with its generator.

pip install 'fedrag-jax[langchain]'
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any

from fedrag_jax.data.examples import Passage, text_of
from fedrag_jax.errors import ConfigError, DataError, missing
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.stores.knowledge_store import Found

try:
    from langchain_core.callbacks import CallbackManager, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableConfig, RunnableSerializable, run_in_executor
    from langchain_core.runnables.config import get_config_list
    from langchain_core.runnables.utils import AddableDict
    from pydantic import AfterValidator, ConfigDict, Field
except ImportError as error:
    raise missing(f"the bridge to LangChain needs langchain-core ({error})", "langchain") from error


def _is_system(value) -> RAGSystem:
    if not isinstance(value, RAGSystem):
        raise ConfigError(f"system must be a RAGSystem, got a {type(value).__name__}")
    return value


# Checked by hand: pydantic would look into a dataclass, down to its arrays.
System = Annotated[Any, AfterValidator(_is_system), Field(repr=False, exclude=True)]
Configs = RunnableConfig | list[RunnableConfig] | None


class RAGRetriever(BaseRetriever):
    """A retriever that returns a system's passages as documents.

    Documents have the passages' ids and texts; the metadata are `title`, `topic` and `score`. The
    questions of a `batch` or `abatch` are searched together.

        RAGRetriever(system=system, k=3) | format_documents | prompt | llm

    Attributes:
      k: number of documents; default: the system's `top_k`. A call can override it:
        `invoke(question, k=5)`, `bind(k=5)`.
    """

    # What is not known here would be dropped without a word.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    system: System
    k: int | None = Field(default=None, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return self._documents([query], k)[0]

    async def _aget_relevant_documents(self, query: str, *, run_manager, k: int | None = None):
        return (await asyncio.to_thread(self._documents, [query], k))[0]

    def batch(
        self,
        inputs: list[str],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs,
    ) -> list[list[Document]]:
        """Returns the documents of each question, with one search; callbacks see one run per question.

        Args:
          return_exceptions: return a question's exception instead of its documents.
          kwargs: `k`.
        """
        if not inputs:
            return []
        runs = [
            self._started(question, settings)
            for question, settings in zip(inputs, get_config_list(config, len(inputs)), strict=True)
        ]
        try:
            found = _each(lambda some: self._documents(some, **kwargs), inputs)
        except BaseException as error:
            for run in runs:
                run.on_retriever_error(error)
            if return_exceptions and isinstance(error, Exception):
                return [error for _ in inputs]
            raise
        for run, documents in zip(runs, found, strict=True):
            if isinstance(documents, Exception):
                run.on_retriever_error(documents)
            else:
                run.on_retriever_end(documents)
        faults = [documents for documents in found if isinstance(documents, Exception)]
        if faults and not return_exceptions:
            raise faults[0]
        return found

    async def abatch(self, inputs: list[str], config: Configs = None, **kwargs):
        """`batch`, without blocking the event loop."""
        return await run_in_executor(None, self.batch, inputs, config, **kwargs)

    def _started(self, question: str, config: RunnableConfig) -> CallbackManagerForRetrieverRun:
        manager = CallbackManager.configure(
            config.get("callbacks"),
            inheritable_tags=config.get("tags"),
            local_tags=self.tags,
            inheritable_metadata={**config.get("metadata", {}), **self._get_ls_params()},
            local_metadata=self.metadata,
        )
        name = config.get("run_name") or self.get_name()
        return manager.on_retriever_start(None, question, name=name, run_id=config.get("run_id"))

    def _documents(self, questions: Sequence[str], k: int | None = None) -> list[list[Document]]:
        for question in questions:
            if not isinstance(question, str):
                raise ConfigError(f"a retriever takes a string, got {question!r}")
        found = self.system.retrieve(questions, self.k if k is None else k)
        return [[_document(f) for f in some] for some in found]


class RAGRunnable(RunnableSerializable[str | dict[str, Any], dict[str, Any]]):
    """A Runnable that takes questions and returns answers with their sources.

    The input is a question, or a dict with a question as "question" or "input" and optionally documents
    to answer from as "context"; other keys are ignored. The output is a dict of "question", "answer",
    "context" (the documents read, best first) and "cited" (the cited documents, if the system's prompt
    style has citations). When streaming, the context comes first, then the answer in pieces, then the
    citations; in modes other than `concatenated` the answer is one piece.

        RAGRunnable(system=system).pick("answer")
        {"context": retriever | rerank, "question": RunnablePassthrough()} | RAGRunnable(system=system)

    Call arguments, for example by `bind(max_new_tokens=8)`, are those of `RAGSystem.batch_query`,
    except mode "search", which reads no context. A batch is one call of the system: sampled answers
    (temperature > 0) depend on their position in it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    system: System

    def invoke(self, input, config: RunnableConfig | None = None, **kwargs) -> dict[str, Any]:
        """Answers one question."""
        return self._call_with_config(self._answer, input, config, **kwargs)

    async def ainvoke(self, input, config: RunnableConfig | None = None, **kwargs):
        """`invoke`, without blocking the event loop."""

        async def answer(input, **how):
            return await asyncio.to_thread(self._answer, input, **how)

        return await self._acall_with_config(answer, input, config, **kwargs)

    def batch(
        self, inputs: list, config: Configs = None, *, return_exceptions: bool = False, **kwargs
    ) -> list[dict[str, Any]]:
        """Answers many questions, decoded together.

        Args:
          return_exceptions: return a question's exception instead of its answer.
        """
        return self._batch_with_config(
            self._answers_or_faults, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    async def abatch(
        self, inputs: list, config: Configs = None, *, return_exceptions: bool = False, **kwargs
    ) -> list[dict[str, Any]]:
        """`batch`, without blocking the event loop."""

        async def answers(inputs, **how):
            return await asyncio.to_thread(self._answers_or_faults, inputs, **how)

        return await self._abatch_with_config(
            answers, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def stream(self, input, config: RunnableConfig | None = None, **kwargs) -> Iterator:
        """Yields parts of the answer's dict, which add up to it."""

        def parts(inputs, **how):
            yield from self._parts(next(inputs), **how)

        yield from self._transform_stream_with_config(iter([input]), parts, config, **kwargs)

    async def astream(
        self, input, config: RunnableConfig | None = None, **kwargs
    ) -> AsyncIterator[AddableDict]:
        """`stream`; each part is computed in a separate thread."""

        async def once():
            yield input

        async def parts(inputs, **how):
            made = self._parts(await anext(inputs), **how)
            while (part := await asyncio.to_thread(next, made, None)) is not None:
                yield part

        async for part in self._atransform_stream_with_config(once(), parts, config, **kwargs):
            yield part

    # --- answers ------------------------------------------------------------------------------

    def _answer(self, input, **how) -> dict[str, Any]:
        return self._answers([input], **how)[0]

    def _answers_or_faults(self, inputs: list, **how) -> list[dict[str, Any] | Exception]:
        return _each(lambda some: self._answers(some, **how), inputs)

    def _answers(self, inputs: list, **how) -> list[dict[str, Any]]:
        questions, contexts = self._asked(inputs)
        read = [[_passage(d) for d in documents] for documents in contexts]
        readings = self.system.read(questions, read, **how)
        mode = how.get("mode", "concatenated")
        return [
            {
                "question": question,
                "answer": reading.answer,
                "context": documents,
                "cited": [*self.system.cited(reading.reasoning, documents, mode)],
            }
            for question, documents, reading in zip(questions, contexts, readings, strict=True)
        ]

    def _parts(self, input, **how) -> Iterator[AddableDict]:
        if how.get("mode", "concatenated") != "concatenated":
            yield AddableDict(self._answer(input, **how))
            return
        (question,), (documents,) = self._asked([input])
        yield AddableDict(question=question, context=documents)
        rest, pieces = (
            {"answer": ""},
            self.system.stream(question, [_passage(d) for d in documents], **how),
        )
        for piece in pieces:
            yield AddableDict(answer=piece)
            rest = {}
        named = self.system.cited(pieces.reasoning, documents)
        yield AddableDict(rest, cited=[*named])

    def _asked(self, inputs: list) -> tuple[list[str], list[list[Document]]]:
        """Returns the questions, and the documents to read for each: given or retrieved ones."""
        asked = [_question_and_context(given) for given in inputs]
        questions = [question for question, _ in asked]
        bare = [question for question, context in asked if context is None]
        found = iter(self.system.retrieve(bare) if bare else [])
        return questions, [
            [_document(f) for f in next(found)] if context is None else context
            for _, context in asked
        ]


def _each(work: Callable[[list], list], inputs: list) -> list:
    """Runs `work` on all inputs at once; if one fails, on each alone, with its exception in its
    place."""
    try:
        return work(inputs)
    except (ConfigError, DataError) as fault:
        return [fault] if len(inputs) == 1 else [one for i in inputs for one in _each(work, [i])]


def _question_and_context(given) -> tuple[str, list[Document] | None]:
    context = None
    question = given
    if isinstance(given, dict):
        named = [given[key] for key in ("question", "input") if key in given]
        if not named or named[0] != named[-1]:
            raise ConfigError(
                "an input needs a question as 'question' or 'input', and no other as both, got a dict "
                f"of {[*given]}"
            )
        question, context = named[0], given.get("context")
    if not isinstance(question, str):
        raise ConfigError(f"a question must be a string, or a dict with one, got {question!r}")
    if context is not None and not (
        isinstance(context, list) and all(isinstance(d, Document) for d in context)
    ):
        raise ConfigError(
            f"'context' must be a list of documents, got {type(context).__name__}: give those of a "
            "retriever as they are, the system's prompt style puts them in words"
        )
    return question, context


def _document(found: Found) -> Document:
    passage, score = found
    metadata = {"title": passage.title, "topic": passage.topic, "score": score}
    return Document(id=passage.id, page_content=passage.text, metadata=metadata)


def _passage(document: Document) -> Passage:
    title, topic = (text_of(document.metadata.get(key)) for key in ("title", "topic"))
    return Passage(document.id or "", title, document.page_content, topic)
