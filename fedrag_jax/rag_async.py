"""A system asked from an event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from fedrag_jax.generation.inference import Lookup, Response


class AsyncAnswers:
    """`query`, `batch_query` and `stream` of a `RAGSystem`, in threads of their own."""

    async def aquery(self, question: str, **how) -> Response:
        """`query`."""
        return await asyncio.to_thread(self.query, question, **how)

    async def abatch_query(self, questions: Sequence[str], **how) -> list[Response]:
        """`batch_query`."""
        return await asyncio.to_thread(self.batch_query, questions, **how)

    async def astream(self, question: str, **how) -> AsyncIterator[str | Lookup]:
        """`stream`, each piece written in a thread of its own."""
        pieces = self.stream(question, **how)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
