"""Mode "search" of a system: the model searches while it writes an answer."""

from collections.abc import Callable, Generator, Iterator, Sequence

import jax

from fedrag_jax.data.examples import reading_text
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.inference import Lookup, Response
from fedrag_jax.generation.rollouts import Rollout, Searching
from fedrag_jax.generation.searching import rolling_out
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.retrieval.stores.passage_source import Found

_AT_ONCE = 32  # questions answered together


class Looking:
    """Returns the texts found for queries.

    Args:
      retrieve: function that returns a number of passages for each question.

    Attributes:
      found: the passages found, by query.
    """

    def __init__(
        self, retrieve: Callable[[Sequence[str], int], list[list[Found]]], searching: Searching
    ):
        self._retrieve, self._searching = retrieve, searching
        self.found: dict[str, list[Found]] = {}

    def __call__(self, queries: Sequence[str]) -> list[str]:
        """Returns the passages found for each query, one per line; an empty text for an empty query."""
        new = [q for q in dict.fromkeys(queries) if q.strip() and q not in self.found]
        asked = [self._searching.asked.replace("{query}", query) for query in new]
        if new:
            self.found |= zip(new, self._retrieve(asked, self._searching.passages), strict=True)
        return [
            "\n".join(reading_text(f.passage) for f in self.found.get(query, ()))
            for query in queries
        ]

    def lookup(self, query: str) -> Lookup:
        """Returns the search with the passages of a query."""
        return Lookup(query, tuple(f.passage for f in self.found.get(query, ())))


def answers_by_searching(
    writer: Writer,
    searching: Searching,
    retrieve: Callable[[Sequence[str], int], list[list[Found]]],
    questions: Sequence[str],
    sampling: Sampling,
) -> Generator[list[Lookup], None, list[Response]]:
    """Yields the searches, one by one; returns the answers.

    Args:
      sampling: `max_new_tokens` limits the tokens between two searches, or up to the end of an answer;
        stop strings are not supported.

    Raises:
      ConfigError: stop strings; more tokens than the model has positions for.
    """
    if sampling.stop:
        raise ConfigError(
            f"mode 'search' ends an answer at its tag, got stop={list(sampling.stop)}: leave it out"
        )
    looking, responses = Looking(retrieve, searching), []
    budget = searching.budget._replace(written=sampling.max_new_tokens)
    for start in range(0, len(questions), _AT_ONCE):
        some = range(len(questions))[start : start + _AT_ONCE]
        # Few sizes, because each compiles anew.
        rows = [*some, *[some[-1]] * ((1 << (len(some) - 1).bit_length()) - len(some))]
        asked = [questions[row] for row in rows]
        rolling = rolling_out(
            writer.network,
            writer.params,
            writer.adapters,
            writer.tokenizer,
            [searching.prompt(writer.tokenizer, question) for question in asked],
            looking,
            questions=asked,
            tags=searching.tags,
            budget=budget,
            stop_tokens=writer.stop_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            key=jax.random.key(sampling.seed) if sampling.temperature else None,
            rows=rows,
        )
        while True:
            try:
                yield [looking.lookup(query) for query in next(rolling)]
            except StopIteration as end:
                responses += [_response(r, looking, searching) for r in end.value[: len(some)]]
                break
    return responses


class Searched(Iterator[str | Lookup]):
    """Iterates over the searches of a question, and then its answer.

    Attributes:
      response: the response after the end; an empty one before.
    """

    reasoning = ""  # as of `inference.Streamed`

    def __init__(self, answering: Generator[list[Lookup], None, list[Response]]):
        self.response = Response("", (), (), finish="")
        self._pieces = self._heard(answering)

    @property
    def finish(self) -> str:
        """The finish reason, as in `Response`."""
        return self.response.finish

    @property
    def tokens(self) -> tuple[int, int]:
        """The token counts, as in `Response`."""
        return self.response.tokens

    def __next__(self) -> str | Lookup:
        return next(self._pieces)

    def close(self) -> None:
        """Stops writing."""
        self._pieces.close()

    def _heard(self, answering) -> Iterator[str | Lookup]:
        while True:
            try:
                yield from next(answering)
            except StopIteration as end:
                (self.response,) = end.value
                if self.response.answer:
                    yield self.response.answer
                return


def _response(rollout: Rollout, looking: Looking, searching: Searching) -> Response:
    found = {
        f.passage.id: f for query in rollout.queries for f in looking.found.get(query, ())
    }.values()
    written = sum(len(part.tokens) for part in rollout.parts if part.written)
    read = len(rollout.prompt) + sum(len(p.tokens) for p in rollout.parts if not p.written)
    return Response(
        rollout.said(searching.tags),
        tuple(f.passage for f in found),
        tuple(f.score for f in found),
        finish="length" if rollout.finish in ("length", "turns") else "stop",
        tokens=(read, written),
        searches=tuple(looking.lookup(query) for query in rollout.queries),
    )
