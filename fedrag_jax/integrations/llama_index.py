"""LlamaIndex components of a RAG system: a retriever, and a query engine that answers with its
generator.

pip install 'fedrag-jax[llama-index]'; no language model of LlamaIndex and no API key are needed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedrag_jax.data.examples import Passage, text_of
from fedrag_jax.errors import ConfigError, missing
from fedrag_jax.generation import inference
from fedrag_jax.generation.text import Sampling
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.vector_index import finite
from fedrag_jax.retrieval.similarity import unit
from fedrag_jax.retrieval.stores.passage_source import Found, found_in

try:
    from llama_index.core.base.base_query_engine import BaseQueryEngine
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.response.schema import (
        RESPONSE_TYPE,
        AsyncStreamingResponse,
        Response,
        StreamingResponse,
    )
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.synthesis import (
        SynthesizeEndEvent,
        SynthesizeStartEvent,
    )
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
    from llama_index.core.settings import Settings
except ImportError as error:
    raise missing(
        f"the bridge to LlamaIndex needs llama-index-core ({error})", "llama-index"
    ) from error

_dispatcher = get_dispatcher(__name__)


class _OwnPrompts:
    """Base class of both components, which use no prompt templates of LlamaIndex."""

    def _get_prompt_modules(self) -> dict:
        return {}

    def _update_prompts(self, prompts_dict: dict) -> None:
        if prompts_dict:
            raise ConfigError(
                f"{type(self).__name__} has no prompt templates, got {[*prompts_dict]}: the generator "
                "reads in the style of its system, RAGSystem.build(prompt_style=...)"
            )


class RAGRetriever(_OwnPrompts, BaseRetriever):
    """A retriever that returns a system's passages as nodes, with their ids, titles and topics."""

    def __init__(
        self,
        system: RAGSystem,
        similarity_top_k: int | None = None,
        callback_manager: CallbackManager | None = None,
    ):
        """A retriever over the system's store, or its corpus.

        Args:
          similarity_top_k: number of nodes; default: the system's `top_k`.
          callback_manager: callback manager of searches; default: that of LlamaIndex's settings.

        Raises:
          ConfigError: `similarity_top_k` below 1.
        """
        if similarity_top_k is not None and similarity_top_k < 1:
            raise ConfigError(f"similarity_top_k must be at least 1, got {similarity_top_k}")
        super().__init__(callback_manager or Settings.callback_manager)
        self.system, self.similarity_top_k = system, similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Returns the nodes nearest to the question, or to the bundle's embedding or texts.

        An embedding must come from the system's own question encoder. For several texts, such as a
        hypothetical document and the question, their mean vector is searched.

        Raises:
          ConfigError: an image, an embedding of another dimension, one for a store of words alone, no
            text among texts to embed, more nodes than there are passages in a corpus.
          DataError: an embedding that is not finite.
        """
        return [_node(found) for found in self._found(query_bundle)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _found(self, query: QueryBundle) -> list[Found]:
        if query.image_path is not None:
            raise ConfigError(f"passages are searched by text, got the image {query.image_path!r}")
        system = self.system
        k = system.top_k if self.similarity_top_k is None else self.similarity_top_k
        vector = self._vector(query)
        if vector is None:
            return system.retrieve([query.query_str], k)[0]
        if system.store is not None:
            return system.store.search([query.query_str], vector, k)[0]
        return found_in(system.retriever.passages, *system.retriever.index.search(vector, k))[0]

    def _vector(self, query: QueryBundle) -> np.ndarray | None:
        """Returns the vector that the bundle searches instead of its question, float32 [1, D]; or
        None."""
        texts = query.custom_embedding_strs
        if query.embedding is None and texts is None:
            return None
        if self.system.store is not None and self.system.store.dimension is None:
            raise ConfigError(
                f"a store of kind {self.system.store.kind!r} searches words, and cannot look for the "
                "embedding or the custom_embedding_strs of a query: use a store of vectors, or leave "
                "out the transform that made them"
            )
        if query.embedding is not None:
            vector = finite([query.embedding], "query")
        elif texts:
            vector = self.system.retriever.embed_questions(texts).mean(0, keepdims=True)
        else:
            raise ConfigError("custom_embedding_strs is empty: give a text to embed, or None")
        dimension = self.system.retriever.vectors.shape[1]
        if vector.shape[1] != dimension:
            raise ConfigError(
                f"the query has an embedding of dimension {vector.shape[1]}, the system's are of "
                f"{dimension}: it is of another encoder; a query asked of another retriever before may "
                "have kept that one's"
            )
        # A mean of vectors of length 1, and somebody else's vector, may be of another.
        return (
            unit(vector) if self.system.retriever.encoder.config.similarity == "cosine" else vector
        )


class RAGQueryEngine(_OwnPrompts, BaseQueryEngine):
    """Retrieves nodes, applies postprocessors, and answers from the remaining nodes.

    Responses have the nodes that were read as `source_nodes`, and the ids of cited nodes in
    `metadata["citations"]`, if the system's prompt style has citations. For a streamed answer the
    citations are None before the first piece. Without nodes, mode "concatenated" answers
    closed book, and the other modes raise ConfigError.

        engine = RAGQueryEngine(system, node_postprocessors=[SimilarityPostprocessor(...)])
        print(engine.query("Who wrote it?"))
    """

    def __init__(
        self,
        system: RAGSystem,
        *,
        similarity_top_k: int | None = None,
        retriever: BaseRetriever | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **how,
    ):
        """An engine that answers by the system's generator.

        Args:
          similarity_top_k: number of nodes to read, see `RAGRetriever`.
          retriever: another retriever instead of the system's, such as a fusion of several. A node is
            read as its text, after the title in its metadata, if any.
          node_postprocessors: postprocessors that rerank, drop or rewrite nodes, in order.
          streaming: whether responses have a `response_gen` that yields the answer as it is written.
          callback_manager: callback manager of queries, retrieval and synthesis, also passed to the
            postprocessors; default: that of LlamaIndex's settings.
          how: as in `RAGSystem.batch_query`, except mode "search", which reads no nodes. Modes that
            weight passages use their cosines with the question, not the nodes' scores.

        Raises:
          ConfigError: a value out of its range, mode "search", a mode that cannot be streamed, both
            `similarity_top_k` and `retriever`.
        """
        if retriever is not None and similarity_top_k is not None:
            raise ConfigError(
                f"similarity_top_k={similarity_top_k} is for the system's own retriever: set it on the "
                "retriever that is given"
            )
        self.mode, self.beams = how.pop("mode", "concatenated"), how.pop("beams", None)
        self.sampling = Sampling.of({"max_new_tokens": system.prompts.max_answer_tokens} | how)
        inference.check(self.mode, self.beams, self.sampling)
        if streaming and self.mode != "concatenated":
            raise ConfigError(
                f"mode {self.mode!r} cannot be streamed: its answer is known at the end alone; leave "
                "out streaming, or use mode 'concatenated'"
            )
        callback_manager = callback_manager or Settings.callback_manager
        super().__init__(callback_manager)
        self.system, self.streaming = system, streaming
        self.retriever = retriever or RAGRetriever(system, similarity_top_k, callback_manager)
        self.node_postprocessors = [*node_postprocessors]
        for step in self.node_postprocessors:
            step.callback_manager = callback_manager

    # --- nodes --------------------------------------------------------------------------------

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Returns the nodes to read, after postprocessing."""
        nodes = self.retriever.retrieve(query_bundle)
        for step in self.node_postprocessors:
            nodes = step.postprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """`retrieve`, without blocking the event loop."""
        nodes = await self.retriever.aretrieve(query_bundle)
        for step in self.node_postprocessors:
            nodes = await step.apostprocess_nodes(nodes, query_bundle=query_bundle)
        return nodes

    # --- answers ------------------------------------------------------------------------------

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answers a question from these nodes.

        Args:
          additional_source_nodes: nodes that are listed as sources but not read.
        """
        sources, question = [*nodes, *(additional_source_nodes or ())], query_bundle.query_str
        with self._synthesis(query_bundle) as finish:
            if not self.streaming:
                answer, told = self._answer(question, nodes)
                return finish(Response(answer, sources, told))
            told = {"citations": None}
            pieces = self._pieces(question, nodes, told)
            return finish(StreamingResponse(pieces, sources, told))

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """`synthesize`, in separate threads."""
        sources, question = [*nodes, *(additional_source_nodes or ())], query_bundle.query_str
        with self._synthesis(query_bundle) as finish:
            if not self.streaming:
                answer, told = await asyncio.to_thread(self._answer, question, nodes)
                return finish(Response(answer, sources, told))
            told = {"citations": None}
            pieces = _in_threads(self._pieces(question, nodes, told))
            return finish(AsyncStreamingResponse(pieces, sources, told))

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(CBEventType.QUERY, query_bundle) as event:
            response = self.synthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(CBEventType.QUERY, query_bundle) as event:
            nodes = await self.aretrieve(query_bundle)
            response = await self.asynthesize(query_bundle, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _event(self, kind: CBEventType, query: QueryBundle):
        return self.callback_manager.event(kind, {EventPayload.QUERY_STR: query.query_str})

    @contextmanager
    def _synthesis(self, query: QueryBundle) -> Iterator:
        """Notifies callbacks that an answer begins; returns a function that notifies of its end."""
        _dispatcher.event(SynthesizeStartEvent(query=query))
        with self._event(CBEventType.SYNTHESIZE, query) as event:

            def finish(response):
                event.on_end(payload={EventPayload.RESPONSE: response})
                _dispatcher.event(SynthesizeEndEvent(query=query, response=response))
                return response

            yield finish

    def _answer(self, question: str, nodes: Sequence[NodeWithScore]) -> tuple[str, dict[str, Any]]:
        (reading,) = self.system.read(
            [question], [[_passage(n) for n in nodes]], mode=self.mode, beams=self.beams,
            **vars(self.sampling),
        )  # fmt: skip
        return reading.answer, self._told(reading.reasoning, nodes)

    def _pieces(self, question: str, nodes, told: dict[str, Any]) -> Iterator[str]:
        """Yields the answer in pieces; its metadata are set before the first piece."""
        pieces = self.system.stream(question, [_passage(n) for n in nodes], **vars(self.sampling))
        for piece in pieces:
            told.update(self._told(pieces.reasoning, nodes))
            yield piece
        told.update(self._told(pieces.reasoning, nodes))  # of an empty answer

    def _told(self, reasoning: str, nodes: Sequence[NodeWithScore]) -> dict[str, Any]:
        named = self.system.cited(reasoning, nodes, self.mode)
        return {"citations": [node.node.node_id for node in named]}


async def _in_threads(pieces: Iterator[str]) -> AsyncIterator[str]:
    """Yields the pieces, each computed in a thread, so that the event loop is not blocked."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _node(found: Found) -> NodeWithScore:
    passage, score = found
    # A language model of LlamaIndex reads the title where the text does not name it already, as our
    # generator does; a topic is what clients differ in, and neither read nor embedded.
    named = ["title"] if passage.title in passage.text else []
    node = TextNode(
        id_=passage.id,
        text=passage.text,
        metadata={"title": passage.title, "topic": passage.topic},
        excluded_llm_metadata_keys=["topic", *named],
        excluded_embed_metadata_keys=["topic"] + ([] if passage.title else ["title"]),
    )
    return NodeWithScore(node=node, score=score)


def _passage(node: NodeWithScore) -> Passage:
    title, topic = (text_of(node.node.metadata.get(key)) for key in ("title", "topic"))
    text = node.node.get_content(metadata_mode=MetadataMode.NONE)
    return Passage(node.node.node_id, title, text, topic)
