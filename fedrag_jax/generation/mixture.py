"""Beam search over a mixture of several prompts, one per passage.

The next token is chosen from the mixture of RAG-Token (Lewis et al. 2020, 2005.11401, section 2.5) and
RA-DIT (2310.01352, Eq. 2):

    p'(y_i | x, y_<i) = sum_z p(z | x) p(y_i | x, z, y_<i)

With one beam the most likely token of the mixture is chosen at every step, the ensemble of REPLUG
(2301.12652). One prompt with weight 1 is plain beam search.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError
from fedrag_jax.generation import decoding
from fedrag_jax.models.decoder import Cache
from fedrag_jax.models.layers import take_rows
from fedrag_jax.models.network import Network, PerLayer


class Hypotheses(NamedTuple):
    """The texts that a beam search found, the most likely first.

    Attributes:
      tokens: int32 [B, best, N].
      log_probs: float32 [B, best, N], log p'(y_i | x, y_<i); 0 after the end of a text; -inf for
        missing texts.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


def beam_search(
    network: Network,
    params,
    tokens,
    mask,
    log_weights,
    *,
    adapters=None,
    beams: int = 1,
    best: int = 1,
    max_new_tokens: int = 16,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> Hypotheses:
    """Returns the most likely texts of at most N tokens, found with `beams` hypotheses.

    The score of a hypothesis is the sum of log p' over its tokens, without a length penalty. An ended
    hypothesis stays in the beam as long as fewer than `beams` others are more likely. The search ends
    when no hypothesis can overtake the `best` first ones.

    Args:
      tokens: int [B, K, T], K prompts of each text, padded on the left.
      mask: [B, K, T], 0 or False where there is padding.
      log_weights: [B, K], log p(z | x).
      beams: number of hypotheses; 1 is greedy.
      best: number of hypotheses to return per text.
      stop_tokens: a text ends with the first of them, which is part of it.
      pad_token: token after the end of a text.

    Raises:
      ConfigError: `beams` below 1, `best` not between 1 and `beams`; prompts as in `decoding.pieces`.
      NotFiniteError: logits that are NaN or infinite.
    """
    if not 1 <= best <= beams:
        raise ConfigError(f"beams must be at least 1 and best at most beams, got {beams}, {best}")
    tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
    decoding.check_options(max_new_tokens, 0.0, 1.0)
    decoding.check_prompts(network, mask, max_new_tokens)
    limits = _Limits(
        np.int32(max_new_tokens),
        np.int32(best),
        np.array(stop_tokens, np.int32),
        np.int32(pad_token),
    )
    room = decoding.bucket(tokens.shape[2] + max_new_tokens - 1, 16)
    log_weights = np.asarray(log_weights, np.float32)
    finite, *found = _search(
        network, beams, room, params, adapters, tokens, mask, log_weights, limits
    )
    decoding.require_finite(bool(np.asarray(finite).all()))
    return Hypotheses(*(np.asarray(x)[:, :best, :max_new_tokens] for x in found))


class _Limits(NamedTuple):
    """Arrays, so that other values need no other program."""

    count: Any
    best: Any
    stops: Any
    pad: Any


class _Beam(NamedTuple):
    """The hypotheses of a batch.

    Attributes:
      tokens, log_probs: [B, n, N], what is written.
      total: [B, n], the sum of `log_probs`; falls from beam to beam. -inf where there is none.
      stopped: bool [B, n].
      token: [B, n], the last one.
      parent: [B, n], the hypothesis of the step before that each goes on with.
      finite: bool [B], whether all logits were that something was chosen by.
    """

    tokens: jax.Array
    log_probs: jax.Array
    total: jax.Array
    stopped: jax.Array
    token: jax.Array
    parent: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(network, beams, room, params, adapters, tokens, mask, log_weights, limits):
    run = functools.partial(network, params, adapters=adapters)
    b, k, width = tokens.shape
    rows, n = b * k, beams
    # The prompts are read once, whatever the number of beams.
    logits, position, cache = decoding.read_prompts(
        run, tokens.reshape(rows, width), mask.reshape(rows, width), room
    )
    shape = b, n, room - width + 1
    start = _Beam(
        jnp.full(shape, limits.pad),
        jnp.zeros(shape, jnp.float32),
        jnp.where(jnp.arange(n) == 0, jnp.zeros((b, 1)), -jnp.inf),
        jnp.zeros((b, n), bool),
        jnp.zeros((b, n), jnp.int32),
        jnp.zeros((b, n), jnp.int32),
        decoding.all_finite(logits).reshape(b, k).all(-1),
    )
    beam = _choose(start, _mixed(logits, log_weights, 1), jnp.int32(0), limits)
    position, cache = _for_each_beam(position, cache, b, n)
    if jax.default_backend() == "cpu":
        params, adapters = decoding.weights_apart(params, adapters)
        cache = decoding.cache_apart(cache)
        run = functools.partial(network, params, adapters=adapters)

    def running(carry):
        i, beam, *_ = carry
        first = (jnp.arange(n) < limits.best)[None]
        return (i < limits.count) & (first & ~beam.stopped).any()

    def step(carry):
        i, beam, position, cache = carry
        position = position + 1
        if n > 1:
            cache = _follow(cache, beam.parent, k, width)
        each = jnp.repeat(beam.token.reshape(-1), k)
        logits, cache = decoding.read_token(run, each, position, cache)
        finite = decoding.all_finite(logits).reshape(b, n, k).all(-1) | beam.stopped
        beam = beam._replace(finite=beam.finite & finite.all(-1))
        beam = _choose(beam, _mixed(logits, log_weights, n), i, limits)
        return i + 1, beam, position, cache

    _, beam, *_ = jax.lax.while_loop(running, step, (jnp.int32(1), beam, position, cache))
    there = jnp.isfinite(beam.total)[..., None]
    return beam.finite, beam.tokens, jnp.where(there, beam.log_probs, -jnp.inf)


def _mixed(logits, log_weights, n):
    """log p' [B, n, V] of logits [B * n * K, V]."""
    b, k = log_weights.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, n, k, -1)
    if k == 1:
        return log_probs[:, :, 0] + log_weights[:, None]
    return jax.nn.logsumexp(log_weights[:, None, :, None] + log_probs, axis=2)


def _choose(beam: _Beam, log_probs, step, limits) -> _Beam:
    """The n likeliest of what the hypotheses can go on with; log p' [B, n, V], or [B, 1, V] of all."""
    (b, n), size = beam.total.shape, log_probs.shape[-1]
    # One that has ended goes on with a single token, at no cost.
    over = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)
    log_probs = jnp.where(beam.stopped[..., None], over, log_probs)
    scores = beam.total[..., None] + log_probs
    total, index = jax.lax.top_k(scores.reshape(b, -1), n)
    parent, token = index // size, (index % size).astype(jnp.int32)
    log_prob = jnp.take_along_axis(log_probs.reshape(b, -1), index, axis=1)
    stopped = take_rows(beam.stopped, parent)
    token = jnp.where(stopped, limits.pad, token)
    return _Beam(
        take_rows(beam.tokens, parent).at[:, :, step].set(token),
        take_rows(beam.log_probs, parent).at[:, :, step].set(log_prob),
        total,
        stopped | jnp.isin(token, limits.stops),
        token,
        parent.astype(jnp.int32),
        beam.finite,
    )


def _for_each_beam(position, cache: Cache, b, n):
    """Positions [B * K] and cache of the prompts, for rows [B * n * K]."""

    def repeat(x, axis):
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = x.reshape(*before, b, 1, -1, *after)
        x = jnp.broadcast_to(x, (*before, b, n, *x.shape[axis + 2 :]))
        return x.reshape(*before, -1, *after)

    keys, values = repeat(cache.keys, 2), repeat(cache.values, 2)
    return repeat(position, 0), Cache(keys, values, repeat(cache.mask, 0), cache.length)


def _follow(cache: Cache, parent, k, width) -> Cache:
    """The cache where each hypothesis has the past of its parent [B, n]; prompts stay as they are."""
    b, n = parent.shape
    parents = jnp.arange(b)[:, None] * n + parent
    rows = (parents[..., None] * k + jnp.arange(k)[None, None]).reshape(-1)

    def moved(x):
        if isinstance(x, PerLayer):
            return PerLayer(tuple(map(moved, x.layers)))
        # [..., rows, S, E], or [G * rows, S, E] of one layer.
        each = x.reshape(*x.shape[: x.ndim - 3], -1, len(rows), *x.shape[-2:])
        written = each[..., width:, :]
        each = each.at[..., width:, :].set(jnp.take(written, rows, axis=-3))
        return each.reshape(x.shape)

    return cache._replace(keys=moved(cache.keys), values=moved(cache.values))
