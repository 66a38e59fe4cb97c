"""Asynchronous methods of a RAG system, for use in an event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Unpack

from fedrag_jax.generation.inference import Lookup, Response
from fedrag_jax.generation.text import AnsweringOptions


class AsyncAnswers:
    """Runs `query`, `batch_query` and `stream` of a `RAGSystem` in separate threads."""

    async def aquery(self, question: str, **how: Unpack[AnsweringOptions]) -> Response:
        """`query`."""
        return await asyncio.to_thread(self.query, question, **how)

    async def abatch_query(
        self, questions: Sequence[str], **how: Unpack[AnsweringOptions]
    ) -> list[Response]:
        """`batch_query`."""
        return await asyncio.to_thread(self.batch_query, questions, **how)

    async def astream(
        self, question: str, **how: Unpack[AnsweringOptions]
    ) -> AsyncIterator[str | Lookup]:
        """`stream`; each piece is written in a separate thread."""
        pieces = self.stream(question, **how)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
