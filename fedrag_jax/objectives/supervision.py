"""Signals of a frozen generator about the passages of a question, computed once and cached.

Every source is called with examples and corpus rows [N, k], and returns columns of a task's table.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.batching import Prompts
from fedrag_jax.data.examples import Example
from fedrag_jax.generation.likelihood import answer_log_probs
from fedrag_jax.models.network import Network
from fedrag_jax.models.shapes import ask
from fedrag_jax.objectives.task import PyTree

CHUNK = 64  # prompts that are read at once


class CachedAnswers:
    """Caches answers to hashable questions; calls `ask` in chunks for new questions.

    Args:
      ask: `ask(list of questions) -> list of answers`, for at most `chunk` questions.
      full: pad the last chunk, so that a compiled program has one shape.
    """

    def __init__(self, ask: Callable[[list], Sequence[Any]], chunk: int, full: bool = True):
        self._ask, self._chunk, self._full, self._known = ask, chunk, full, {}

    def __call__(self, questions: Sequence) -> list:
        missing = [q for q in dict.fromkeys(questions) if q not in self._known]
        for start in range(0, len(missing), self._chunk):
            some = missing[start : start + self._chunk]
            spare = (self._chunk - len(some)) * self._full
            found = self._ask(some + some[:1] * spare)
            self._known.update(zip(some, found, strict=False))
        return [self._known[q] for q in questions]


class Likelihoods:
    """log p(y_i | z, x, y_<i), for each passage z alone."""

    def __init__(self, decoder: Network, parts: PyTree, prompts: Prompts):
        self._prompts, self._known = prompts, CachedAnswers(self._read, CHUNK)
        self._run = decoder, parts["decoder"], parts["adapters"]

    def __call__(self, examples: Sequence[Example], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `answer_log_probs` [N, k, A], `answer_mask` [N, A], `lengths` [N, k] of the prompts,
        and `prompt_tokens` [N, k], the lengths with padding."""
        pairs = [(e, int(row)) for e, some in zip(examples, rows, strict=True) for row in some]
        known, lengths = zip(*self._known(pairs), strict=True)
        shape = (*np.shape(rows), known[0].shape[-1])
        return {
            "answer_log_probs": np.stack(known).reshape(shape),
            "answer_mask": _answer_mask(self._prompts, examples, shape[-1]),
            "lengths": np.array(lengths, np.int32).reshape(shape[:2]),
            "prompt_tokens": np.full(shape[:2], self._prompts.training_width(1), np.int32),
        }

    def _read(self, pairs):
        examples, rows = zip(*pairs, strict=True)
        table = self._prompts.training_table(examples, np.array(rows)[:, None], per_passage=True)
        found = ask(_log_probs, *self._run, table)
        return list(zip(np.asarray(found)[:, 0], table["lengths"][:, 0], strict=True))


class LeaveOneOut:
    """log p(y | D without z, x) for each passage z, with a prompt of all other passages (LOOP,
    Atlas)."""

    def __init__(self, decoder: Network, parts: PyTree, prompts: Prompts):
        self._prompts, self._known = prompts, CachedAnswers(self._read, CHUNK // 4)
        self._run = decoder, parts["decoder"], parts["adapters"]

    def __call__(self, examples: Sequence[Example], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `left_out_log_probs` [N, k], summed over the answer; `answer_mask`, `lengths` [N, k]
        and `prompt_tokens` [N, k] as in `Likelihoods`."""
        rows = np.asarray(rows)
        k = rows.shape[1]
        asked = [
            (example, tuple(int(r) for r in np.delete(some, z)))
            for example, some in zip(examples, rows, strict=True)
            for z in range(k)
        ]
        found, lengths = zip(*self._known(asked), strict=True)
        table = {"left_out_log_probs": np.array(found, np.float32).reshape(rows.shape)}
        return table | _was_read(self._prompts, examples, lengths, k, k - 1)

    def _read(self, asked):
        examples, rows = zip(*asked, strict=True)
        table = self._prompts.training_table(examples, np.array(rows), per_passage=False)
        found = np.asarray(ask(_log_probs, *self._run, table))[:, 0] * table["answer_mask"]
        return list(zip(found.sum(1), table["lengths"][:, 0], strict=True))


class Attention:
    """The contribution of each passage in one prompt to the decoder's attention for the answer.

    Atlas (2208.03299, section 2.2) uses alpha_n |v_n| of the cross-attention of a Fusion-in-Decoder. A
    decoder-only model has no cross-attention. Here it is the attention from the positions that predict
    the answer to the tokens n of a passage, summed over these tokens and averaged over answer tokens,
    heads and layers. Passages in one prompt compete for attention, so their order has an effect.
    """

    def __init__(self, decoder: Network, parts: PyTree, prompts: Prompts):
        self._prompts, self._known = prompts, CachedAnswers(self._read, CHUNK // 4)
        self._run = decoder, parts["decoder"], parts["adapters"]

    def __call__(self, examples: Sequence[Example], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `attention` [N, k]; `answer_mask`, `lengths` [N, 1] and `prompt_tokens` [N, 1] as in
        `Likelihoods`."""
        asked = [(e, tuple(map(int, some))) for e, some in zip(examples, rows, strict=True)]
        found, lengths = zip(*self._known(asked), strict=True)
        table = {"attention": np.stack(found)}
        return table | _was_read(self._prompts, examples, lengths, 1, np.shape(rows)[1])

    def _read(self, asked):
        examples, rows = zip(*asked, strict=True)
        table = self._prompts.training_table(examples, np.array(rows), per_passage=False)
        table["places"] = self._prompts.passage_places(examples, rows)
        found = np.asarray(ask(_attention, *self._run, table, k=len(rows[0])))
        return list(zip(found, table["lengths"][:, 0], strict=True))


class Teacher:
    """Scores of a model that reads question and passage together, such as a cross-encoder.

    Args:
      score: `score(questions, texts) -> float [P]`, one score per pair.
      texts: texts of the corpus.
    """

    def __init__(self, score: Callable[[list[str], list[str]], Any], texts: Sequence[str]):
        self._score, self._texts = score, texts
        self._known = CachedAnswers(self._ask, CHUNK, full=False)

    def __call__(self, examples: Sequence[Example], rows: np.ndarray) -> dict[str, np.ndarray]:
        """`teacher_scores` [N, k]."""
        pairs = [(e.question, int(r)) for e, some in zip(examples, rows, strict=True) for r in some]
        found = np.array(self._known(pairs), np.float32)
        return {"teacher_scores": found.reshape(np.shape(rows))}

    def _ask(self, pairs):
        questions, rows = zip(*pairs, strict=True)
        return list(self._score(list(questions), [self._texts[r] for r in rows]))


def _was_read(
    prompts: Prompts, examples, lengths, count: int, passages: int
) -> dict[str, np.ndarray]:
    """Returns `answer_mask` [N, A], `lengths`, `prompt_tokens` [N, count] of prompts with `passages`
    passages."""
    shape, width = (len(examples), count), prompts.training_width(passages)
    return {
        "answer_mask": _answer_mask(prompts, examples, prompts.answer_width),
        "lengths": np.array(lengths, np.int32).reshape(shape),
        "prompt_tokens": np.full(shape, width, np.int32),
    }


def _answer_mask(prompts: Prompts, examples, width: int) -> np.ndarray:
    lengths = [len(prompts.answer_tokens(e.answer)) for e in examples]
    return (np.arange(width) < np.array(lengths)[:, None]).astype(np.float32)


_log_probs = jax.jit(answer_log_probs, static_argnums=0)  # one program for all clients


@functools.partial(jax.jit, static_argnums=0, static_argnames="k")
def _attention(decoder, params, adapters, table, k: int):
    """Returns the mean of `Decoder.attention` over answer tokens, summed per passage: [N, k]."""
    tokens = table["tokens"][:, 0]
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask, read = index < table["lengths"], table["answer_positions"][:, 0] - 1
    seen = decoder(params, tokens, index, mask, read, method="attention", adapters=adapters)
    weight = table["answer_mask"] / table["answer_mask"].sum(1, keepdims=True)
    each = jnp.einsum("nat,na->nt", seen, weight)
    return jnp.einsum("nt,ntk->nk", each, jax.nn.one_hot(table["places"], k))
