"""Mode "search" of a system: the model searches while it writes an answer."""

from collections.abc import Callable, Generator, Iterator, Sequence

from fedrag_jax.data.corpora import Pool
from fedrag_jax.data.examples import Example, Passage, reading_text
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.inference import SEARCH, Lookup, Response
from fedrag_jax.generation.rollouts import Rollout, Searching
from fedrag_jax.generation.searching import rolling_out
from fedrag_jax.generation.text import Sampling, Writer
from fedrag_jax.retrieval.stores.passage_source import Found

_AT_ONCE = 32  # questions answered together


class Looking:
    """Returns the texts found for queries, and remembers what was found.

    Args:
      retrieve: `retrieve(questions, k)` returns k passages for each question; with a pool,
        `retrieve(questions, k, pools)` returns them from the question's corpus rows.
      pool: `pool(example)`: the corpus rows that the queries of an example may find; default: all.
    """

    def __init__(
        self,
        retrieve: Callable[..., list[list[Found]]],
        searching: Searching,
        pool: Pool | None = None,
    ):
        self._retrieve, self._searching, self._pool = retrieve, searching, pool
        self._found: dict[tuple[str, str], list[Found]] = {}

    def __call__(self, queries: Sequence[str], examples: Sequence[Example] = ()) -> list[str]:
        """Returns the passages found for each query, one per line; an empty text for an empty query.

        Args:
          examples: with a pool, the example of each query.
        """
        asking: Sequence[Example | None] = examples if self._pool else [None] * len(queries)
        keys = [self._key(*asked) for asked in zip(queries, asking, strict=True)]
        new = {
            key: example
            for key, example in zip(keys, asking, strict=True)
            if key[0].strip() and key not in self._found
        }
        if new:
            asked = [self._searching.asked.replace("{query}", query) for query, _ in new]
            pools = ([self._pool(example) for example in new.values()],) if self._pool else ()
            found = self._retrieve(asked, self._searching.passages, *pools)
            self._found |= zip(new, found, strict=True)
        return [
            "\n".join(reading_text(f.passage) for f in self._found.get(key, ())) for key in keys
        ]

    def found(self, query: str, example: Example | None = None) -> list[Found]:
        """Returns the passages that a query found, of an example if there is a pool."""
        return self._found.get(self._key(query, example), [])

    def lookup(self, query: str) -> Lookup:
        """Returns the search with the passages of a query."""
        return Lookup(query, tuple(f.passage for f in self.found(query)))

    def _key(self, query: str, example: Example | None) -> tuple[str, str]:
        return query, example.id if self._pool and example else ""


def require_bare(system_prompt: str) -> None:
    """Refuses a system prompt, which searching would ignore.

    Raises:
      ConfigError: a system prompt.
    """
    if system_prompt:
        raise ConfigError(
            f"mode {SEARCH!r} has an instruction of its own and takes no system prompt, got "
            f"{system_prompt[:80]!r}: remove it (system.under('')), or add it to searching.instruction"
        )


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
            lambda queries, _: looking(queries),
            questions=asked,
            tags=searching.tags,
            budget=budget,
            stop_tokens=writer.stop_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            key=sampling.key,
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
    found: dict[Passage, float] = {}  # ids may be shared, by pieces of a document
    for query in rollout.queries:
        for passage, score in looking.found(query):
            found.setdefault(passage, score)
    written = sum(len(part.tokens) for part in rollout.parts if part.written)
    read = len(rollout.prompt) + sum(len(p.tokens) for p in rollout.parts if not p.written)
    return Response(
        rollout.said(searching.tags),
        tuple(found),
        tuple(found.values()),
        finish="length" if rollout.finish in ("length", "turns") else "stop",
        tokens=(read, written),
        searches=tuple(looking.lookup(query) for query in rollout.queries),
    )
