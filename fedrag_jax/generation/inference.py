"""Answering modes: ways to answer a question from several passages, by name in `MODES`.

| mode | answer | source |
|---|---|---|
| concatenated | generated from one prompt with all passages | |
| ensemble | greedy on the mixture of next tokens | RA-DIT (2310.01352), Eq. 2; REPLUG (2301.12652) |
| rag_token | beam search on that mixture | Lewis et al. 2020 (2005.11401), section 2.5 |
| rag_sequence_thorough | most likely under the mixture of answers, all scored | the same |
| rag_sequence_fast | most likely under it, using only scores of the beam search | the same |
| vote | the answer of most single passages | REPLUG, question answering |

All modes but the first use one prompt per passage z, weighted by p(z|x), the softmax of scaled
similarities over the passages. With one passage and one beam all modes give the same answer.

Every mode is `mode(writer, prompts, log_weights, sampling, beams) -> [Completion]` over `prompts`
[B][K] of int [T], with K prompts per question (one per passage, or one with all passages), and
`log_weights` [B, K], log p(z|x). In the additional mode "search" the model searches while it writes
(`retrieval.looking_up`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import logsumexp

from fedrag_jax.data.answers import comparable
from fedrag_jax.data.examples import Passage
from fedrag_jax.errors import ConfigError, DataError
from fedrag_jax.generation import decoding
from fedrag_jax.generation.likelihood import answer_log_probs, next_log_probs
from fedrag_jax.generation.text import Completion, Sampling, Writer, chunk_by_chunk

Asked = Sequence[Sequence[np.ndarray]]
_SCORED = {"cpu": 8}  # prompts with an answer whose likelihood is computed at once
_SCORED_ACCELERATOR = 64


def concatenated(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """Continues each question's only prompt; `log_weights` are ignored."""
    return writer.complete([prompt for (prompt,) in prompts], sampling)


def ensemble(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """Greedy on p'(y_i | x, y_<i) = sum_z p(z|x) p(y_i | x, z, y_<i): `rag_token` with one beam."""
    return rag_token(writer, prompts, log_weights, sampling, beams=1)


def rag_token(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """Beam search on p'(y_i | x, y_<i) = sum_z p(z|x) p(y_i | x, z, y_<i).

    With one beam it is the `ensemble` of RA-DIT and REPLUG.
    """
    found = writer.search(prompts, log_weights, beams=beams, sampling=sampling)
    return [best for best, *_ in found]


def rag_sequence_thorough(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """Returns the y with the highest p(y|x) = sum_z p(z|x) p(y|x,z) among the `beams` best of each z.

    Every y is scored with every passage: all written tokens, including EOS.
    """
    asked, candidates = [], []
    for i, of_passages in enumerate(_own_answers(writer, prompts, sampling, beams)):
        distinct = {y: c for found in of_passages for y, c in found.items()}
        asked += [i] * len(distinct)
        candidates += distinct.values()
    scores = sequence_log_probs(writer, [prompts[i] for i in asked], [c.tokens for c in candidates])
    scored: list = [[] for _ in prompts]
    for i, candidate, of_passages in zip(asked, candidates, scores, strict=True):
        scored[i].append((logsumexp(log_weights[i] + of_passages), candidate))
    return [_best(some) for some in scored]


def rag_sequence_fast(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """As `rag_sequence_thorough`, but p(y|x,z) is 0 if the beam search with passage z did not find
    y."""
    answers = []
    own = _own_answers(writer, prompts, sampling, beams)
    for of_passages, r in zip(own, log_weights, strict=True):
        terms, candidates = defaultdict(list), {}
        for found, r_z in zip(of_passages, r, strict=True):
            for y, c in found.items():
                terms[y].append(r_z + c.log_probs.sum())
                candidates[y] = c
        answers.append(_best([(logsumexp(some), candidates[y]) for y, some in terms.items()]))
    return answers


def vote(
    writer: Writer, prompts: Asked, log_weights, sampling: Sampling, beams
) -> list[Completion]:
    """Each passage gives its greedy answer exp(mean token log-prob) x p(z|x) votes; equal answers add
    up.

    Answers are equal by `data.answers.comparable`. Of the winning answers, the text with the most votes
    from a single passage is returned.
    """
    answers = []
    own = _own_answers(writer, prompts, sampling, beams=1)
    for of_passages, r in zip(own, log_weights, strict=True):
        votes = defaultdict(list)
        for found, r_z in zip(of_passages, r, strict=True):
            (c,) = found.values()
            votes[comparable(c.text)].append((math.exp(r_z + c.log_probs.mean()), c))

        # fsum, so that the order of the passages does not matter.
        def all_votes(some):
            return math.fsum(v for v, _ in some), max((v, c.text) for v, c in some)

        answers.append(_best(max(votes.values(), key=all_votes)))
    return answers


def _best(scored: Sequence[tuple[float, Completion]]) -> Completion:
    """Returns the completion with the highest score; ties go to the last text in order."""
    return max(scored, key=lambda one: (one[0], one[1].text))[1]


MODES = {
    f.__name__: f
    for f in (concatenated, ensemble, rag_token, rag_sequence_thorough, rag_sequence_fast, vote)
}
SEARCH = "search"  # the mode that reads what it looks up itself, see `retrieval.looking_up`
# Beams of the modes that search with several, unless said otherwise; Lewis et al. answer questions
# greedily where they search passage by passage.
BEAMS = {"rag_token": 4, "rag_sequence_thorough": 1, "rag_sequence_fast": 1}


def check(mode: str, beams: int | None, sampling: Sampling) -> int:
    """Returns the number of beams of a mode.

    Raises:
      ConfigError: an unknown mode, beams for a mode without beams or below 1, or a temperature for a
        greedy mode.
    """
    if mode == SEARCH:
        raise ConfigError(
            f"mode {SEARCH!r} searches for its own passages: use RAGSystem.query, batch_query, or "
            "stream without passages"
        )
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {[*MODES, SEARCH]}, got {mode!r}")
    if beams is not None and mode not in BEAMS:
        raise ConfigError(
            f"mode {mode!r} takes no beams, got {beams}; those that do are {[*BEAMS]}"
        )
    if beams is not None and beams < 1:
        raise ConfigError(f"beams must be at least 1, got {beams}")
    if sampling.temperature and mode != "concatenated":
        raise ConfigError(
            f"mode {mode!r} takes the likeliest tokens, got temperature {sampling.temperature:g}: set "
            "it to 0, or use mode 'concatenated'"
        )
    return BEAMS.get(mode, 1) if beams is None else beams


def require_even(mode: str, rows: Sequence[Sequence]) -> None:
    """Refuses passages that a mode other than `concatenated` cannot weight.

    Raises:
      ConfigError: no passages for a question, or different numbers of passages.
    """
    if 0 in (counts := {len(some) for some in rows}) or len(counts) > 1:
        raise ConfigError(
            f"mode {mode!r} reads equally many passages for all questions, and at least one; got "
            f"{sorted(counts)}: use mode 'concatenated'"
        )


def _own_answers(
    writer: Writer, prompts: Asked, sampling: Sampling, beams: int
) -> list[list[dict[tuple[int, ...], Completion]]]:
    """Returns the `beams` most likely answers of each question and prompt, by their tokens."""
    flat = [[prompt] for some in prompts for prompt in some]
    certain = np.zeros((len(flat), 1))
    found = writer.search(flat, certain, beams=beams, best=beams, sampling=sampling)
    # A stop string can cut two hypotheses down to one.
    distinct = iter([{tuple(c.tokens.tolist()): c for c in some} for some in found])
    return [[next(distinct) for _ in some] for some in prompts]


def sequence_log_probs(
    writer: Writer, prompts: Asked, answers: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """log p(y | prompt) float64 [M][K] of answers y, int [A] each, after each of their K prompts.

    Raises:
      NotFiniteError: log-probabilities that are NaN or infinite.
    """
    pairs = [(prompt, y) for some, y in zip(prompts, answers, strict=True) for prompt in some]
    rows = [np.concatenate(pair) for pair in pairs]
    most = _SCORED.get(jax.default_backend(), _SCORED_ACCELERATOR)

    def score(chosen):
        lengths = np.array([[len(rows[i])] for i in chosen])
        starts = np.array([[len(pairs[i][0])] for i in chosen])
        a = decoding.bucket(int((lengths - starts).max()), 8)
        width = decoding.bucket(int(lengths.max()))
        tokens = np.zeros((len(chosen), 1, width), np.int32)
        for row, i in zip(tokens, chosen, strict=True):
            row[0, : len(rows[i])] = rows[i]
        places = starts + np.arange(a)
        written = places < lengths
        batch = {
            "tokens": tokens,
            "lengths": lengths,
            "answer_positions": np.where(written, places, 1)[:, None],
        }
        found = _answer_log_probs(writer.network, writer.params, writer.adapters, batch)
        found = np.where(written, np.asarray(found, np.float64)[:, 0], 0)
        decoding.require_finite(bool(np.isfinite(found).all()))
        return found.sum(1)

    found = iter(chunk_by_chunk(score, [len(row) for row in rows], most))
    return [np.array([next(found) for _ in some]) for some in prompts]


def next_token_log_probs(
    writer: Writer, prompts: Sequence[np.ndarray], tokens: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns log p(token | prompt), float64 [Q][C], of candidate tokens int [C] after each prompt:
    `sequence_log_probs` for answers of one token, with every prompt read once.

    Raises:
      NotFiniteError: log-probabilities that are NaN or infinite.
    """
    most = _SCORED.get(jax.default_backend(), _SCORED_ACCELERATOR)

    def score(chosen):
        lengths = np.array([len(prompts[i]) for i in chosen])
        read = np.zeros((len(chosen), decoding.bucket(int(lengths.max()))), np.int32)
        for row, i in zip(read, chosen, strict=True):
            row[: len(prompts[i])] = prompts[i]
        found = _next_log_probs(writer.network, writer.params, writer.adapters, read, lengths)
        wanted = [
            np.asarray(row, np.float64)[tokens[i]] for row, i in zip(found, chosen, strict=True)
        ]
        decoding.require_finite(all(np.isfinite(some).all() for some in wanted))
        return wanted

    return list(chunk_by_chunk(score, [len(prompt) for prompt in prompts], most))


_answer_log_probs = jax.jit(answer_log_probs, static_argnums=0)
_next_log_probs = jax.jit(next_log_probs, static_argnums=0)


# --- reasoning and answers -----------------------------------------------------------------------


def require_asked(questions: Sequence[str]) -> None:
    """Refuses blank questions.

    Raises:
      DataError: a blank question; the error gives its number.
    """
    for i, question in enumerate(questions, start=1):
        if not question.strip():
            raise DataError(f"question {i} of {len(questions)} is blank: ask something")


class Lookup(NamedTuple):
    """A search made while writing, and its results."""

    query: str
    passages: tuple[Passage, ...]


class Response(NamedTuple):
    """An answer with its sources.

    Attributes:
      sources: the passages in the prompt, best first.
      scores: their similarities, or the store's scores.
      cited: the cited sources; empty if the prompt style has no numbers.
      finish, tokens: see `Reading`.
      searches: the searches of mode "search", in order.
    """

    answer: str
    sources: tuple[Passage, ...]
    scores: tuple[float, ...]
    cited: tuple[Passage, ...] = ()
    finish: str = "stop"
    tokens: tuple[int, int] = (0, 0)
    searches: tuple[Lookup, ...] = ()

    @property
    def found(self) -> list[tuple[Passage, float]]:
        """The sources with their scores."""
        return [*zip(self.sources, self.scores, strict=True)]


class Reading(NamedTuple):
    """An answer to a question from given passages.

    Attributes:
      reasoning: the text before the answer, such as a citation; "" if there is none.
      finish: "stop", "length" (cut off at `max_new_tokens`), or "repetition" (ended before repeating).
      tokens: the number of tokens of all prompts, and of the generated text, including its end.
    """

    answer: str
    reasoning: str
    finish: str
    tokens: tuple[int, int]


def reading(written: Completion, prompts: Sequence[np.ndarray], mark: str) -> Reading:
    """Builds a `Reading` from the prompts, the generated text, and the mark before the answer."""
    tokens = sum(map(len, prompts)), len(written.tokens)
    return Reading(*answer_and_reasoning(written.text, mark), written.finish, tokens)


def answer_and_reasoning(text: str, mark: str) -> tuple[str, str]:
    """Returns the text after the mark and the text before it; without a mark, all is the answer."""
    reasoning, found, answer = text.partition(mark) if mark else ("", "", text)
    return (answer.strip(), reasoning.strip()) if found else (text.strip(), "")


class Streamed(Iterator[str]):
    """Iterates over the pieces of an answer as they are written, without the reasoning.

    Attributes:
      finish, tokens: as in `Reading`, after all pieces have arrived; "" and (0, 0) before.
    """

    def __init__(
        self, begin: Callable[[], Generator[str, None, tuple[Completion, int]]], mark: str
    ):
        """Generation begins when the first piece is requested.

        Args:
          begin: generator of all written pieces, which returns the text and the prompt's tokens.
          mark: the mark between reasoning and answer; "" for none.
        """
        self._mark, self._written, self.finish, self.tokens = mark, [], "", (0, 0)
        self._pieces = answer_pieces(self._heard(begin), mark)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reasoning(self) -> str:
        """The reasoning, as in `Reading`; available from the first piece on."""
        return answer_and_reasoning("".join(self._written), self._mark)[1]

    def close(self) -> None:
        """Stops writing."""
        self._pieces.close()

    def _heard(self, begin) -> Iterator[str]:
        pieces = begin()
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                written, read = end.value
                self.finish, self.tokens = written.finish, (read, len(written.tokens))
                return
            self._written.append(piece)
            yield piece


def answer_pieces(pieces: Iterable[str], mark: str) -> Iterator[str]:
    """Yields the pieces of the answer of `answer_and_reasoning`."""
    answer = space = ""
    for piece in _after(iter(pieces), mark):
        # White space waits for what follows it: there is none at either end of an answer.
        piece = space + piece if answer else piece.lstrip()
        space = piece[len(piece.rstrip()) :]
        answer += piece.rstrip()
        if piece.strip():
            yield piece.rstrip()


def _after(pieces: Iterator[str], mark: str) -> Iterator[str]:
    """Yields the pieces after the mark; all pieces if there is no mark."""
    said = ""
    for piece in pieces if mark else ():
        said += piece
        if mark in said:
            said = said.partition(mark)[2]
            break
    yield said
    yield from pieces
