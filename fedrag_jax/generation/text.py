"""Text generation, whole or streamed, up to a stop token, a stop string or a length."""

import concurrent.futures
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from fedrag_jax.data.batching import ANSWER_TOKENS
from fedrag_jax.data.padding import left_padded
from fedrag_jax.data.seeds import key_of
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import decoding, mixture
from fedrag_jax.models.network import Network

# Prompts decoded together: few, so that a CPU keeps them in its cache.
_ROWS = {"cpu": 10}
ROWS_ACCELERATOR = 64
# Prompts with one passage each, times beams, of those that are mixed.
_ROWS_SEARCHED = {"cpu": 20}
_ROWS_SEARCHED_ACCELERATOR = 256
_IN_FLIGHT = {"cpu": 4}  # such chunks decoded at once: one alone keeps two cores half busy
# Decoding stops when a text repeats itself, because small models do not stop by themselves. A repeated
# piece has at least the first number of tokens and comes three times; together they have at least the
# second number.
_SHORTEST_REPEATED, _FEWEST_REPEATED = 4, 32
_UNFINISHED = "\ufffd"  # what a character of which bytes are missing is decoded to


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of text generation; the default is greedy.

    Attributes:
      max_new_tokens: maximum number of tokens, including the stop token.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: samples from the smallest set of tokens with at least this probability.
      seed: random seed. The n-th prompt of a call has its own random numbers, independent of the
        others.
      stop: strings that end a text; the text ends before them.

    Raises:
      ConfigError: a value out of its range.
    """

    max_new_tokens: int = ANSWER_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Sampling":
        """Creates options by name; raises ConfigError for an unknown name."""
        known = [field.name for field in dataclasses.fields(cls)]
        if strange := sorted(options.keys() - {*known}):
            raise ConfigError(f"unknown sampling options {strange}; choose among {known}")
        return cls(**options)

    def __post_init__(self):
        decoding.check_options(self.max_new_tokens, self.temperature, self.top_p)
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed must be a number of 64 bits, got {self.seed}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(
                f"stop must be a sequence of strings that are not empty, got {self.stop!r}"
            )

    @property
    def key(self) -> jax.Array | None:
        """The random key of the seed; None for greedy decoding."""
        return key_of(self.seed) if self.temperature else None


class SamplingOptions(TypedDict, total=False):
    """Settings of `Sampling` by name."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]


class AnsweringOptions(SamplingOptions, total=False):
    """Answering options by name; see `RAGSystem.batch_query`."""

    mode: str
    beams: int | None


class Completion(NamedTuple):
    """The generated continuation of a prompt.

    Attributes:
      text: the text without special tokens, without the stop string and the text after it, and without
        repetitions. An incomplete character at the end is left out.
      finish: "stop" for a stop token or a stop string, "repetition" if the text repeated itself,
        "length" otherwise.
      tokens: int32 [N], including the token that ended the text; without repetitions.
      log_probs: float32 [N], of these tokens; see `decoding.Generated`.
    """

    text: str
    finish: str
    tokens: np.ndarray
    log_probs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Writer:
    """A decoder with its tokenizer, which continues prompts of tokens as text.

    Attributes:
      network: the decoder, with its adapters if there are any.
      stop_tokens: each ends a text.
    """

    network: Network
    params: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    adapters: Any = None

    def complete(
        self, prompts: Sequence[np.ndarray], sampling: Sampling | None = None
    ) -> list[Completion]:
        """Continues prompts, int [T] each; prompts of similar length are decoded together.

        Raises:
          ConfigError: a prompt that leaves no room for `max_new_tokens`.
        """
        sampling = sampling or Sampling()
        most = _ROWS.get(jax.default_backend(), ROWS_ACCELERATOR)
        weights = decoding.token_weights(self.params, self.adapters)

        def write(chosen):
            texts, some = [], [prompts[i] for i in chosen]
            for texts in self._texts(some, chosen, sampling, weights=weights):
                if all(text.finish for text in texts):
                    break
            return [text.completion() for text in texts]

        return chunk_by_chunk(write, [len(p) for p in prompts], most)

    def search(
        self,
        prompts: Sequence[Sequence[np.ndarray]],
        log_weights,
        beams: int = 1,
        best: int = 1,
        sampling: Sampling | None = None,
    ) -> list[list[Completion]]:
        """Finds texts that continue several prompts at once, by `mixture.beam_search`.

        Args:
          prompts: K prompts per text, int [T].
          log_weights: [B, K], log p(z | x) of the prompts.
          beams: number of hypotheses; 1 is greedy.
          best: number of hypotheses to return per text, at most `beams`.
          sampling: `max_new_tokens` and `stop`; a stop string truncates a result.

        Returns:
          The hypotheses of each text, the most likely first: `best`, or as many as there are. Their
          `log_probs` are those of the mixture.

        Raises:
          ConfigError: as `complete` and `mixture.beam_search`.
        """
        if not len(prompts):
            return []
        sampling = sampling or Sampling()
        k, log_weights = len(prompts[0]), np.asarray(log_weights, np.float32)
        pad = self.tokenizer.pad_token_id or 0
        rows = _ROWS_SEARCHED.get(jax.default_backend(), _ROWS_SEARCHED_ACCELERATOR)
        # A power of two, like the number of texts where there are few.
        most = 1 << (max(1, rows // (k * beams)).bit_length() - 1)

        def write(chosen):
            each = [prompt for i in chosen for prompt in prompts[i]]
            tokens, mask = left_padded(each, pad, multiple=decoding.bucket(max(map(len, each))))
            found = mixture.beam_search(
                self.network,
                self.params,
                tokens.reshape(len(chosen), k, -1),
                mask.reshape(len(chosen), k, -1),
                log_weights[chosen],
                adapters=self.adapters,
                beams=beams,
                best=best,
                max_new_tokens=sampling.max_new_tokens,
                stop_tokens=self.stop_tokens,
                pad_token=pad,
            )
            return [
                [self._completion(*one, sampling) for one in zip(*of_one, strict=True)]
                for of_one in zip(*found, strict=True)
            ]

        found = chunk_by_chunk(write, [max(map(len, some)) for some in prompts], most)
        return [[text for text in some if np.isfinite(text.log_probs).all()] for some in found]

    def _completion(self, tokens, log_probs, sampling: Sampling) -> Completion:
        text = _Text(self.tokenizer, self.stop_tokens, sampling)
        text.add(tokens, log_probs)
        return text.completion()

    def stream(
        self, prompt: np.ndarray, sampling: Sampling | None = None, every: int = 4
    ) -> Generator[str, None, Completion]:
        """Yields the text of `complete` for one prompt in pieces of a few tokens; returns the
        completion.

        Text that may still change is held back: an incomplete character, or a possible beginning of a
        stop string or of a repetition.

        Args:
          every: tokens between two pieces, at most 16.

        Raises:
          ConfigError: at the first piece, as `complete`, or for `every` out of its range.
        """
        sampling, sent = sampling or Sampling(), 0
        for (text,) in self._texts([prompt], np.zeros(1), sampling, every):
            ready = text.text if text.finish else _settled(text.settled, sampling.stop)
            if len(ready) > sent:
                yield ready[sent:]
                sent = len(ready)
            if text.finish:
                return text.completion()

    def _texts(
        self, prompts, rows, sampling, every=decoding.PIECE, weights=None
    ) -> Iterator[list["_Text"]]:
        """Yields the texts written so far, repeatedly."""
        pad = self.tokenizer.pad_token_id or 0
        longest = max(len(p) for p in prompts)
        tokens, mask = left_padded(prompts, pad, multiple=decoding.bucket(longest))
        pieces = decoding.pieces(
            self.network,
            self.params,
            tokens,
            mask,
            adapters=self.adapters,
            max_new_tokens=sampling.max_new_tokens,
            stop_tokens=self.stop_tokens,
            pad_token=pad,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            key=sampling.key,
            rows=rows,
            every=every,
            weights=weights,
        )
        texts = [_Text(self.tokenizer, self.stop_tokens, sampling) for _ in prompts]
        for piece in pieces:
            for text, *new in zip(texts, *piece, strict=True):
                text.add(*new)
            yield texts


def chunk_by_chunk(write, lengths: Sequence[int], most: int) -> list:
    """Calls `write(chosen)` for chunks of prompts with similar length; returns the results in order."""
    order = np.argsort(lengths, kind="stable")
    # Few sizes, because each compiles anew: a power of two, or the most there can be.
    count = min(most, 1 << max(len(lengths) - 1, 0).bit_length())
    chunks = [order[start : start + count] for start in range(0, len(order), count)]
    filled = (np.concatenate([c, np.repeat(c[-1:], count - len(c))]) for c in chunks)
    written: list = [None] * len(lengths)
    with concurrent.futures.ThreadPoolExecutor(_IN_FLIGHT.get(jax.default_backend(), 1)) as pool:
        for chosen, found in zip(chunks, pool.map(write, filled), strict=True):
            for i, one in zip(chosen, found, strict=False):
                written[i] = one
    return written


class _Text:
    """A text that is being written."""

    def __init__(self, tokenizer, stop_tokens: tuple[int, ...], sampling: Sampling):
        self._tokenizer, self._stop_tokens, self._sampling = tokenizer, stop_tokens, sampling
        self._tokens, self._log_probs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        self._cut: str | None = None  # the text, if a stop string ended it
        self.finish = ""

    @property
    def text(self) -> str:
        return self._decode(len(self._tokens)) if self._cut is None else self._cut

    @property
    def settled(self) -> str:
        """The text without a possible beginning of a repetition."""
        count = len(self._tokens)
        return self._decode(count - max(_repeated(self._tokens, count).values(), default=0))

    def add(self, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        if self.finish:
            return
        seen = len(self._tokens)
        ends = np.flatnonzero(np.isin(tokens, self._stop_tokens))
        if ends.size:
            self.finish, tokens = "stop", tokens[: ends[0] + 1]
        self._tokens = np.concatenate([self._tokens, tokens])
        self._log_probs = np.concatenate([self._log_probs, log_probs[: len(tokens)]])
        if self._sampling.stop and self._found(len(self._tokens)):
            # Token by token, so that the end does not depend on the size of the pieces.
            end = next(n for n in range(seen + 1, len(self._tokens) + 1) if self._found(n))
            self.finish, self._cut = "stop", self._decode(end)[: min(self._found(end))]
            self._tokens, self._log_probs = self._tokens[:end], self._log_probs[:end]
        elif (end := self._end_before_repetition(seen)) is not None:
            self.finish = "repetition"
            self._tokens, self._log_probs = self._tokens[:end], self._log_probs[:end]
        elif not self.finish and len(self._tokens) >= self._sampling.max_new_tokens:
            self.finish = "length"

    def _end_before_repetition(self, seen: int) -> int | None:
        """Ends a text that repeats itself before its first repetition."""
        for count in range(seen + 1, len(self._tokens) + 1):
            for period, length in _repeated(self._tokens, count).items():
                if length >= max(2 * period, _FEWEST_REPEATED):
                    # What comes round again may begin with the full stop before it.
                    end = count - length
                    return end + self._decode(end + 1).endswith((".", "!", "?"))
        return None

    def completion(self) -> Completion:
        return Completion(self.text, self.finish, self._tokens, self._log_probs)

    def _found(self, count: int) -> list[int]:
        """Returns the positions where stop strings begin in the text of the first `count` tokens."""
        text = self._decode(count)
        return [at for at in map(text.find, self._sampling.stop) if at >= 0]

    def _decode(self, count: int) -> str:
        tokens = self._tokens[:count]
        if count and tokens[-1] in self._stop_tokens:
            tokens = tokens[:-1]
        # Clean-up would take back a space that has been sent when a full stop follows it.
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.rstrip(_UNFINISHED)


def _repeated(tokens: np.ndarray, count: int) -> dict[int, int]:
    """Returns, by period, how many of the last of `count` tokens equal the token one period before."""
    found = {}
    for period in range(_SHORTEST_REPEATED, count):
        if tokens[count - 1] == tokens[count - 1 - period]:
            same = tokens[period:count] == tokens[: count - period]
            found[period] = len(same) if same.all() else int(np.argmin(same[::-1]))
    return found


def _settled(text: str, stop: tuple[str, ...]) -> str:
    """Returns the part of a text that no further token can change."""
    begun = (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
    return text[: len(text) - max(begun, default=0)]
