"""Decoding with cached keys and values, greedy or sampled.

There are two compiled programs: `_begin` reads the prompts and chooses one token, `_advance` chooses up
to `PIECE` more. `pieces` yields their tokens, `generate` concatenates them. The number of tokens,
temperature and top_p are inputs of the programs: only another shape needs a compilation, and cache
sizes are rounded to few values (see `bucket`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError, NotFiniteError
from fedrag_jax.models.decoder import Cache
from fedrag_jax.models.network import Network, per_layer

PIECE = 16  # tokens that one call of `_advance` writes at most


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: int32 [B, N].
      log_probs: float32 [B, N], log p(token | earlier tokens) of the model at temperature 1 and without
        top-p, however the token was chosen. 0 after the end of a row.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


def generate(
    network: Network,
    params,
    tokens,
    mask,
    *,
    max_new_tokens: int = 16,
    pad_token: int = 0,
    **options,
) -> Generated:
    """Continues prompts by N tokens; ends early when every row has stopped.

    Args:
      tokens: int [B, T], padded on the left.
      mask: [B, T], 0 or False where there is padding.
      pad_token: token after the end of a row.
      options: as in `pieces`.

    Raises:
      ConfigError, NotFiniteError: as `pieces`.
    """
    written = pieces(
        network, params, tokens, mask, max_new_tokens=max_new_tokens, pad_token=pad_token, **options
    )
    chosen, log_probs = (np.concatenate(parts, axis=1) for parts in zip(*written, strict=True))
    missing = (0, 0), (0, max_new_tokens - chosen.shape[1])
    return Generated(np.pad(chosen, missing, constant_values=pad_token), np.pad(log_probs, missing))


def pieces(
    network: Network,
    params,
    tokens,
    mask,
    *,
    adapters=None,
    max_new_tokens: int = 16,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    rows=None,
    every: int = PIECE,
    weights=None,
) -> Iterator[Generated]:
    """Yields the tokens of `generate` in pieces: the first token, then `every` tokens at a time.

    Args:
      stop_tokens: a row ends with the first of them, which is part of the output.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_p: samples from the smallest set of tokens with at least this probability (Holtzman et al.,
        1904.09751), after the division by `temperature`.
      key: random key; the draws of a row depend only on the key, the row's number and the row's number
        of tokens.
      rows: int [B], the numbers of the rows; default: 0, 1, ...
      every: tokens per piece, at most `PIECE`.
      weights: `token_weights(params, adapters)`, for calls that share it; default: made for this call.

    Yields:
      Arrays [B, 1], then [B, n], n <= every; nothing when every row has stopped.

    Raises:
      ConfigError: an option out of its range; padding at the end of a row; or a prompt that exceeds the
        model's positions together with N tokens.
      NotFiniteError: logits that are NaN or infinite.
    """
    tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
    check_options(max_new_tokens, temperature, top_p)
    check_prompts(network, mask, max_new_tokens)
    if not 1 <= every <= PIECE:
        raise ConfigError(f"every must be between 1 and {PIECE}, got {every}")
    if temperature > 0 and key is None:
        raise ConfigError(
            f"temperature {temperature:g} draws tokens at random: give a key, or temperature 0"
        )
    rows = np.arange(len(tokens)) if rows is None else rows
    options = Options(
        np.array(stop_tokens, np.int32),
        np.int32(pad_token),
        np.float32(temperature),
        np.float32(top_p),
        key if temperature > 0 else None,
        np.asarray(rows, np.int32),
    )
    sampled = temperature > 0
    room = bucket(tokens.shape[1] + max_new_tokens - 1, 16)
    state, *written = _begin(network, sampled, room, params, adapters, tokens, mask, options)
    yield _finite(Generated(*map(np.asarray, written)))
    done = 1
    if max_new_tokens > 1:
        params, adapters = token_weights(params, adapters) if weights is None else weights
        state = state._replace(cache=token_cache(state.cache))
    while done < max_new_tokens and not np.asarray(state.stopped).all():
        count = min(every, max_new_tokens - done)
        state, *written = _advance(
            network, sampled, state, params, adapters, np.int32(count), options
        )
        yield _finite(Generated(*(np.asarray(x)[:, :count] for x in written)))
        done += count


def traced_prompts(
    network: Network, params, adapters, shape: tuple[int, int], new_tokens: int, place: Callable
) -> jax.stages.Traced:
    """Returns the traced program that reads prompts [B, T], with room for new tokens, from shapes.

    Args:
      place: `place(tree)`: adds the placement to shapes.
    """
    batch = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, bool))
    room = bucket(shape[1] + new_tokens - 1, 16)
    options = _likeliest(shape[0])
    return _begin.trace(network, False, room, *place((params, adapters, *batch, options)))


def traced_tokens(
    network: Network, params, adapters, state, rows: int, place: Callable
) -> jax.stages.Traced:
    """Returns the traced program that writes up to `PIECE` more tokens, from shapes.

    Args:
      state: shapes and placement of the first result of the first program.
      place: as in `traced_prompts`.
    """
    params, adapters, count, options = place((params, adapters, np.int32(1), _likeliest(rows)))
    return _advance.trace(network, False, state, params, adapters, count, options)


def _likeliest(rows: int) -> "Options":
    numbers = np.arange(rows, dtype=np.int32)
    stops, pad = np.zeros(1, np.int32), np.int32(0)
    return Options(stops, pad, np.float32(0), np.float32(1), None, numbers)


def _finite(written: Generated) -> Generated:
    require_finite(not np.isnan(written.log_probs).any())
    return written


def require_finite(finite: bool) -> None:
    """Raises NotFiniteError where a model's logits are not."""
    if not finite:
        raise NotFiniteError(
            "the generator's logits are NaN or infinite, so there is no answer: its weights or "
            "adapters hold such numbers, or its dtype is too narrow; load another checkpoint, or use "
            "float32"
        )


def check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ConfigError for an option out of its range."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature != 0 and not 1e-3 <= temperature < np.inf:
        raise ConfigError(
            f"temperature must be 0 (the likeliest token) or at least 0.001, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(
            f"top_p must be above 0 and at most 1 (every token), got {top_p}; for the likeliest token "
            "set temperature to 0"
        )


def check_prompts(network: Network, mask: np.ndarray, max_new_tokens: int) -> None:
    """Raises ConfigError for padding at the end of a row of `mask` [..., T], or too many tokens."""
    if not mask[..., -1].all():
        raise ConfigError(
            "generation continues the last token: pad prompts on the left, not the right"
        )
    most, longest = network.config.max_positions, int(mask.sum(-1).max())
    if longest + max_new_tokens > most:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the "
            f"model's {most} positions: shorten one of them"
        )


def bucket(length: int, least: int = 32) -> int:
    """Rounds a length up to a multiple of `least`; long lengths to an eighth of a power of two.

    Lengths up to N therefore have at most 8 log2(N) sizes, each less than an eighth too long.
    """
    multiple = max(least, 1 << max(length.bit_length() - 4, 0))
    return -(-length // multiple) * multiple


class Options(NamedTuple):
    """Options of sampling and stopping, as arrays, so that other values need no compilation."""

    stops: Any
    pad: Any
    temperature: Any
    top_p: Any
    key: Any
    rows: Any


class _State(NamedTuple):
    """The state of a batch: last token [B], its position [B], number of tokens, and cache."""

    token: jax.Array
    position: jax.Array
    step: jax.Array
    stopped: jax.Array
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(network, sampled, room, params, adapters, tokens, mask, options):
    run = functools.partial(network, params, adapters=adapters)
    logits, position, cache = read_prompts(run, tokens, mask, room)
    token, log_prob = choose(logits, sampled, options, jnp.int32(0))
    stopped = jnp.isin(token, options.stops)
    state = _State(token, position, jnp.int32(1), stopped, cache)
    return state, token[:, None], log_prob[:, None]


def token_weights(params, adapters):
    """Returns parameters and adapters as the program that writes tokens reads them fastest.

    On a CPU this is a copy with the arrays of the layers apart, as large as the model; elsewhere they
    are returned as they are.
    """
    return jax.jit(weights_apart)(params, adapters) if _on_cpu() else (params, adapters)


def token_cache(cache: Cache) -> Cache:
    """Returns a cache as `token_weights` returns parameters."""
    return jax.jit(cache_apart)(cache) if _on_cpu() else cache


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def weights_apart(params, adapters):
    """Separates the arrays of the layers."""
    return tuple(
        tree | {name: per_layer(tree[name]) for name in tree if name == "layers"} if tree else tree
        for tree in (params, adapters)
    )


def cache_apart(cache: Cache) -> Cache:
    """Separates the arrays of the layers."""
    keys, values = (
        per_layer(x.reshape(len(x), -1, *x.shape[3:])) for x in (cache.keys, cache.values)
    )
    return cache._replace(keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _advance(network, sampled, state, params, adapters, count, options):
    run = functools.partial(network, params, adapters=adapters)
    rows = len(state.token)

    def running(carry):
        i, state, *_ = carry
        return (i < count) & ~state.stopped.all()

    def step(carry):
        i, (token, position, number, stopped, cache), tokens, log_probs = carry
        position = position + 1
        logits, cache = read_token(run, token, position, cache)
        token, log_prob = choose(logits, sampled, options, number)
        token = jnp.where(stopped, options.pad, token)
        tokens = tokens.at[:, i].set(token)
        log_probs = log_probs.at[:, i].set(jnp.where(stopped, 0, log_prob))
        stopped = stopped | jnp.isin(token, options.stops)
        return i + 1, _State(token, position, number + 1, stopped, cache), tokens, log_probs

    tokens, log_probs = jnp.full((rows, PIECE), options.pad), jnp.zeros((rows, PIECE), jnp.float32)
    return jax.lax.while_loop(running, step, (jnp.int32(0), state, tokens, log_probs))[1:]


def read_prompts(run, tokens, mask, room: int):
    """Reads prompts [B, T]; returns logits [B, V], the last position [B], and a cache of `room` places.

    Args:
      run: the network with its parameters.
    """
    rows, width = tokens.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    last = jnp.full((rows, 1), width - 1)
    hidden, cache = run(tokens, positions, mask, read=last, room=room)
    return run(hidden[:, 0], method="logits"), positions[:, -1], cache


def read_token(run, token, position, cache: Cache):
    """Reads one more token [B] at its position [B]; returns logits [B, V] and the updated cache."""
    seen = jnp.ones((len(token), 1), bool)
    hidden, cache = run(token[:, None], position[:, None], seen, cache=cache)
    return run(hidden[:, 0], method="logits"), cache


def choose(logits, sampled, options, step):
    """Chooses a token for each row of [B, V]; returns int32 [B] and its log-probability, float32 [B].

    The log-probability is NaN if a row's logits are not all finite; `pieces` checks for this.

    Args:
      step: int32, or [B], the row's number of tokens, for its random numbers.
    """
    scores = logits
    if sampled:
        scores = logits / options.temperature
        kept = jax.lax.cond(
            options.top_p < 1, nucleus, lambda scores, _: scores > -jnp.inf, scores, options.top_p
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(options.key, options.rows)
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, options.rows.shape))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        scores = jnp.where(kept, scores + noise, -jnp.inf)
    # The first of the largest: XLA on a CPU takes three times as long over argmax.
    best, size = scores.max(-1, keepdims=True), scores.shape[-1]
    token = jnp.where(scores >= best, jnp.arange(size), size - 1).min(-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_prob = jnp.where(all_finite(logits), chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)
    return token, log_prob.astype(jnp.float32)


def all_finite(logits: jax.Array) -> jax.Array:
    """Returns whether all values of the last axis are finite: bool [...]."""
    return jnp.isfinite(logits).all(-1)


def nucleus(scores: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns the smallest set of tokens with probability `top_p`: bool [B, V].

    Ties go to the first tokens. The threshold probability is found by bisection in 31 passes, which is
    ten times as fast as sorting on a CPU.
    """
    probs = jax.nn.softmax(scores, axis=-1).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)  # in the order of the numbers

    def mass(taken):
        return jnp.where(taken, probs, 0).sum(-1, keepdims=True)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = mass(bits >= middle) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.zeros((len(scores), 1), jnp.int32)
    beyond = jnp.int32(0x3F800001)  # the float after 1
    least, _ = jax.lax.fori_loop(0, 31, halve, (start, start + beyond))
    above, equal = bits > least, bits == least
    before = jnp.cumsum(equal, axis=-1) - 1
    value = jax.lax.bitcast_convert_type(least, jnp.float32)
    return above | equal & (mass(above) + before.astype(value.dtype) * value < top_p)
