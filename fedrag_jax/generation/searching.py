"""Batched generation with searches: think, search, read the results, continue (ReSearch, 2503.19470;
Search-R1, 2503.09516).

All rollouts of a batch are written together. A rollout that closes its search tag waits. When no
rollout is being written, all waiting ones search in one call, the results are read into the cache in
one forward pass, and they continue, in a smaller batch if few are left. Batches and caches have few
predefined sizes, so that few programs are compiled. Written and retrieved tokens are recorded
separately: a tag inside a passage is never taken for a tag of the rollout.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.data.padding import left_padded
from fedrag_jax.data.prompts import plain
from fedrag_jax.data.spelling import Spelling
from fedrag_jax.errors import ConfigError
from fedrag_jax.generation.decoding import (
    Options,
    bucket,
    check_options,
    choose,
    read_prompts,
    require_finite,
    token_cache,
    token_weights,
)
from fedrag_jax.generation.rollouts import BUDGET, TAGS, Budget, Growing, Rollout, Tags
from fedrag_jax.models.decoder import Cache
from fedrag_jax.models.network import Network

T = TypeVar("T")
# The text found for each query; the numbers say which prompts ask.
Search = Callable[[list[str], list[int]], list[str]]
PIECE = 8  # tokens written between two looks for a tag
HALVINGS = 3  # of a batch as its rollouts end: each is another program to compile


def roll_out(
    network: Network,
    params,
    adapters,
    tokenizer,
    prompts: Sequence[np.ndarray],
    search: Search,
    **how,
) -> list[Rollout]:
    """Writes one rollout for each prompt.

    Args:
      how: see `rolling_out`.
    """
    return returned(rolling_out(network, params, adapters, tokenizer, prompts, search, **how))


def returned(steps: Generator[Any, None, T]) -> T:
    """Runs a generator to its end and returns its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def rolling_out(
    network: Network,
    params,
    adapters,
    tokenizer,
    prompts: Sequence[np.ndarray],
    search: Search,
    *,
    questions: Sequence[str] = (),
    tags: Tags = TAGS,
    budget: Budget = BUDGET,
    stop_tokens: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    rows: Sequence[int] | None = None,
) -> Generator[list[str], None, list[Rollout]]:
    """Writes one rollout per prompt; yields the queries after each search, and returns the rollouts.

    Args:
      prompts: int32 [T] each.
      search: `search(queries, numbers)` returns the text found for each query of all waiting rollouts;
        the numbers are the indices of their prompts.
      questions: the question of each prompt, which `tags.found` may repeat.
      stop_tokens: tokens that end a rollout, unless they belong to a closing tag.
      temperature, top_p, key, rows: as in `decoding.pieces`.

    Raises:
      ConfigError: an option or a budget out of its range, more tokens than the model has positions
        for, a window of attention that they do not fit.
      NotFiniteError: logits that are NaN or infinite.
    """
    check_options(budget.written, temperature, top_p)
    if min(budget.turns, budget.found - 1) < 0:
        raise ConfigError(f"a budget needs turns >= 0 and found >= 1, got {budget}")
    if temperature > 0 and key is None:
        raise ConfigError(f"temperature {temperature:g} draws tokens at random: give a key")
    if not len(prompts):
        return []
    closing = {tags.search[1], tags.answer[1]}
    stop_tokens = tuple(t for t in stop_tokens if tokenizer.decode([t]) not in closing)
    pad = tokenizer.pad_token_id or 0
    longest = max(map(len, prompts))
    tokens, mask = left_padded(prompts, pad, multiple=bucket(longest))
    pieces = -(-budget.written // PIECE)
    most = longest + (budget.turns + 1) * pieces * PIECE + budget.turns * budget.found
    once = tokens.shape[1] + pieces * PIECE + 1  # places until the first search
    room = once + budget.turns * (pieces * PIECE + 1 + budget.found)
    _require_room(network, most, room)
    options = Options(
        np.array(stop_tokens, np.int32),
        np.int32(pad),
        np.float32(temperature),
        np.float32(top_p),
        key if temperature > 0 else None,
        np.asarray(range(len(prompts)) if rows is None else rows, np.int32),
    )
    sampled = temperature > 0
    spell = Spelled(tokenizer, tags, budget.found)
    asked = questions or [""] * len(prompts)
    rollouts = [Growing(prompt, tokenizer, tags, budget, stop_tokens) for prompt in prompts]
    batch = np.arange(len(prompts))  # which of them each row is
    state, token, log_prob = _read(network, sampled, once, params, adapters, tokens, mask, options)
    params, adapters = token_weights(params, adapters)
    state = state._replace(cache=token_cache(state.cache))
    require_finite(not np.isnan(np.asarray(log_prob)).any())
    for rollout, *first in zip(rollouts, np.asarray(token), np.asarray(log_prob), strict=True):
        rollout.add(*([one] for one in first))
    while True:
        growing = [rollouts[number] for number in batch]
        while any(rollout.writing for rollout in growing):
            resting = np.array([not rollout.writing for rollout in growing])
            state, wrote, log_probs = _write(
                network, sampled, state, resting, params, adapters, options
            )
            wrote, log_probs = np.asarray(wrote), np.asarray(log_probs)
            require_finite(not np.isnan(log_probs).any())
            # Of what was written after a tag nothing is kept, also in the cache.
            kept = [
                rollout.add(*new) if rollout.writing else 0
                for rollout, *new in zip(growing, wrote, log_probs, strict=True)
            ]
            state = state._replace(kept=jnp.array(kept, jnp.int32))
        waiting = np.array([rollout.waits for rollout in growing])
        if not waiting.any():
            return [rollout.done() for rollout in rollouts]
        going = _fewer(waiting)
        state, batch = _going_on(state, going, room), batch[going]
        options = options._replace(rows=options.rows[going])
        askers = [int(number) for number in batch if rollouts[number].waits]
        queries = [rollouts[number].query for number in askers]
        texts = iter(search(queries, askers))
        yield queries
        chunk = np.full((len(batch), budget.found + 1), pad, np.int32)
        there = np.zeros(chunk.shape, bool)
        for row, number in enumerate(batch):
            if rollouts[number].waits:
                # The last token that was written has not been read yet, unless others followed it.
                text = spell(next(texts), asked[number])
                read = rollouts[number].found(text, unread=rollouts[number].unread)
                chunk[row, len(chunk[row]) - len(read) :] = read
                there[row, len(chunk[row]) - len(read) :] = True
        state, token, log_prob = _append(
            network, sampled, state, params, adapters, chunk, there, options
        )
        firsts = np.asarray(token), np.asarray(log_prob)
        require_finite(not np.isnan(firsts[1][there[:, -1]]).any())
        for row in np.flatnonzero(there[:, -1]):
            rollouts[batch[row]].add(*(first[row : row + 1] for first in firsts))


def _fewer(waiting: np.ndarray) -> np.ndarray:
    """The rows to go on with: those that wait, and resting ones up to the next size there is."""
    size = len(waiting)
    for _ in range(HALVINGS):
        if waiting.sum() <= size // 2:
            size //= 2
    return np.sort(np.argsort(~waiting, kind="stable")[:size])


def _require_room(network: Network, most: int, room: int) -> None:
    config = network.config
    if most > config.max_positions:
        raise ConfigError(
            f"prompts and budget come to {most} tokens, more than the model's {config.max_positions} "
            "positions: allow fewer turns or tokens"
        )
    if (narrow := [w for w in config.windows if w]) and min(narrow) < room:
        raise ConfigError(
            f"some layers attend to only {min(narrow)} tokens, but rollouts take {room} places: "
            "allow fewer turns or tokens, or use a model without a window"
        )


class Spelled:
    """Spells found passages as tokens, at most `most` of them."""

    def __init__(self, tokenizer, tags: Tags, most: int):
        self._tokenizer, self._most = tokenizer, most
        self._spelling = Spelling(tokenizer)
        self._head, self._tail = tags.found.split("{text}")
        self._closing = tags.search[1]

    def __call__(self, text: str, question: str) -> list[int]:
        # What closes it stays, whatever is cut.
        tail = self.ending(question)
        head = self._spelling.after(self._closing, self._head + plain(self._tokenizer, text))
        return [*head[: max(self._most - len(tail), 0)], *tail][: self._most]

    def ending(self, question: str) -> list[int]:
        """Returns the tokens after the passages: their closing tag, and the question if repeated."""
        question = plain(self._tokenizer, question)
        return self._spelling.after("a", self._tail.replace("{question}", question))


class _State(NamedTuple):
    """The state of a batch.

    Attributes:
      token: [B], the last one, not read yet.
      position: [B], of the token before it.
      step: [B], number of tokens.
      resting: bool [B], rows that did not write the last piece.
      kept: [B], tokens of the last piece that stay; the next program cuts the rest.
      cache: the past.
      start: the first place of the last piece in it.
    """

    token: jax.Array
    position: jax.Array
    step: jax.Array
    resting: jax.Array
    kept: jax.Array
    cache: Cache
    start: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(network, sampled, room, params, adapters, tokens, mask, options):
    run = functools.partial(network, params, adapters=adapters)
    logits, position, cache = read_prompts(run, tokens, mask, room)
    steps = jnp.zeros(len(tokens), jnp.int32)
    token, log_prob = choose(logits, sampled, options, steps)
    resting = jnp.zeros(len(tokens), bool)
    state = _State(token, position, steps + 1, resting, steps + PIECE, cache, cache.length)
    return state, token, log_prob


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _write(network, sampled, state, resting, params, adapters, options):
    """Writes a piece: tokens and log-probabilities [B, PIECE]; resting rows read nothing."""
    run = functools.partial(network, params, adapters=adapters)
    state = _cut(state)
    start, kept = state.cache.length, jnp.full_like(state.kept, PIECE)
    writing = (~resting).astype(jnp.int32)

    def step(state, _):
        position = state.position + writing
        hidden, cache = run(
            state.token[:, None], position[:, None], ~resting[:, None], cache=state.cache
        )
        logits = run(hidden[:, 0], method="logits")
        token, log_prob = choose(logits, sampled, options, state.step)
        token = jnp.where(resting, state.token, token)
        log_prob = jnp.where(resting, 0, log_prob)
        moved = _State(token, position, state.step + writing, resting, kept, cache, start)
        return moved, (token, log_prob)

    state = state._replace(resting=resting, kept=kept, start=start)
    state, (tokens, log_probs) = jax.lax.scan(step, state, length=PIECE)
    return state, tokens.T, log_probs.T


@functools.partial(jax.jit, static_argnums=2)
def _going_on(state, rows, room):
    """Returns the state of some rows, with a cache of a given length."""
    cache, batch = state.cache, len(state.token)

    def some(x):
        # [G * B, S, E] of a layer by itself, or [L, G, B, S, E]
        heads = x.reshape(*x.shape[:-3], -1, batch, *x.shape[-2:]) if x.ndim == 3 else x
        heads = jnp.take(heads, rows, axis=-3)
        heads = jnp.pad(heads, [*[(0, 0)] * (heads.ndim - 2), (0, room - x.shape[-2]), (0, 0)])
        return heads.reshape(-1, *heads.shape[-2:]) if x.ndim == 3 else heads

    keys, values = jax.tree.map(some, (cache.keys, cache.values))
    mask = jnp.pad(cache.mask[rows], [(0, 0), (0, room - cache.mask.shape[1])])
    each = "token", "position", "step", "resting", "kept"
    ours = {name: getattr(state, name)[rows] for name in each}
    return state._replace(**ours, cache=Cache(keys, values, mask, cache.length))


def _cut(state):
    """Returns the state after the last piece of each row is cut to `kept` tokens."""
    kept = state.kept
    places = jnp.arange(state.cache.mask.shape[1])[None]
    # Its first place holds the token before it, the last token it wrote is not read yet.
    beyond = (places > state.start + kept[:, None]) & (places < state.cache.length)
    cut = ~state.resting & (kept < PIECE)
    mask = state.cache.mask & ~(beyond & cut[:, None])
    # A row that was cut goes on from its last token kept, which has been read.
    position = jnp.where(cut, state.position - (PIECE - 1) + kept, state.position)
    step = jnp.where(cut, state.step - PIECE + kept, state.step)
    return state._replace(position=position, step=step, cache=state.cache._replace(mask=mask))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _append(network, sampled, state, params, adapters, chunk, there, options):
    """Reads a chunk [B, C], padded on the left, of some rows, and chooses what follows it."""
    run = functools.partial(network, params, adapters=adapters)
    state = _cut(state)
    numbers = jnp.cumsum(there, axis=1, dtype=jnp.int32)
    positions = state.position[:, None] + jnp.maximum(numbers, 1)
    last = jnp.full((len(chunk), 1), chunk.shape[1] - 1)
    hidden, cache = run(chunk, positions, there, cache=state.cache, read=last)
    logits = run(hidden[:, 0], method="logits")
    token, log_prob = choose(logits, sampled, options, state.step)
    read, count = there.any(axis=1), there.sum(axis=1, dtype=jnp.int32)
    state = _State(
        jnp.where(read, token, state.token),
        state.position + count,
        state.step + read.astype(jnp.int32),
        state.resting,
        jnp.full_like(state.kept, PIECE),
        cache,
        cache.length,
    )
    return state, token, log_prob
