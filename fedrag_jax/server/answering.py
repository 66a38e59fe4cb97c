"""Answers questions of many callers; questions that wait at the same time form one batch."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from fedrag_jax.generation.inference import SEARCH, Lookup, Response
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.looking_up import Searched

AT_ONCE = 32  # questions of one batch
STREAMS = 4  # answers that are written side by side, a piece at a time
INSTRUCTED = 16  # system prompts that are kept ready


class Question(NamedTuple):
    """A waiting question.

    Attributes:
      how: options of `RAGSystem.batch_query`; questions with equal options are answered together.
    """

    text: str
    system_prompt: str
    how: dict[str, Any]
    answered: asyncio.Future


class Written(NamedTuple):
    """An answer that is being written.

    Attributes:
      pieces: pieces of text, and in mode "search" the searches.
      response: returns the response without its answer, after all pieces have arrived.
    """

    pieces: AsyncIterator[str | Lookup]
    response: Callable[[], Response]


class Answering:
    """Answers questions of many callers in one event loop; the system runs in threads.

    Sampled answers (temperature above 0) depend on their position in a batch. Such questions are
    answered alone, so that a seed gives the same answer whatever other questions are waiting.
    """

    def __init__(self, system: RAGSystem):
        self.system = system
        self._waiting: asyncio.Queue[Question] = asyncio.Queue()
        self._streams = asyncio.Semaphore(STREAMS)
        self._instructed: dict[str, RAGSystem] = {"": system}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A context in which questions are answered."""
        worker = asyncio.create_task(self._answer_all())
        try:
            yield
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    async def query(self, text: str, system_prompt: str = "", **how) -> Response:
        """As `RAGSystem.query`."""
        answered = asyncio.get_running_loop().create_future()
        await self._waiting.put(Question(text, system_prompt, how, answered))
        return await answered

    async def stream(self, text: str, system_prompt: str = "", **how) -> Written:
        """As `RAGSystem.stream`; the answer has begun when this returns, so errors are raised at
        once."""
        system = await asyncio.to_thread(self._under, system_prompt)
        searches = how.get("mode") == SEARCH
        (found,) = ((),) if searches else await asyncio.to_thread(system.retrieve, [text])
        passages = [f.passage for f in found]
        pieces = system.stream(text, None if searches else passages, **how)
        async with self._streams:
            first = await asyncio.to_thread(next, pieces, None)

        async def all_pieces():
            piece = first
            async with self._streams:
                while piece is not None:
                    yield piece
                    piece = await asyncio.to_thread(next, pieces, None)

        def response() -> Response:
            if isinstance(pieces, Searched):
                return pieces.response
            told = tuple(f.score for f in found), system.cited(pieces.reasoning, passages)
            return Response("", tuple(passages), *told, pieces.finish, pieces.tokens)

        return Written(all_pieces(), response)

    async def _answer_all(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and len(batch) < AT_ONCE:
                batch.append(self._waiting.get_nowait())
            while batch:
                first = batch[0]
                alone = first.how.get("temperature", 0.0) > 0
                together = [q for q in batch if _alike(q, first)] if not alone else [first]
                batch = [q for q in batch if not any(q is other for other in together)]
                await self._answer(together)

    async def _answer(self, questions: list[Question]) -> None:
        first = questions[0]
        questions = [q for q in questions if not q.answered.cancelled()]
        try:
            found = await asyncio.to_thread(self._ask, questions, first.system_prompt, first.how)
        except Exception as error:
            if len(questions) > 1:  # one of them may be to blame
                for question in questions:
                    await self._answer([question])
            elif questions and not questions[0].answered.done():
                questions[0].answered.set_exception(error)
            return
        for question, response in zip(questions, found, strict=True):
            if not question.answered.done():  # a caller that went away
                question.answered.set_result(response)

    def _ask(self, questions: list[Question], system_prompt: str, how) -> list[Response]:
        system = self._under(system_prompt)
        return system.batch_query([q.text for q in questions], **how)

    def _under(self, system_prompt: str) -> RAGSystem:
        # Of several threads the slower makes the same again.
        system = self._instructed.get(system_prompt)
        if system is None:
            system = self.system.under(system_prompt)
            if len(self._instructed) > INSTRUCTED:
                self._instructed = {"": self.system}
            self._instructed[system_prompt] = system
        return system


def _alike(one: Question, other: Question) -> bool:
    return one.system_prompt == other.system_prompt and one.how == other.how
