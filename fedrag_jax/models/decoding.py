"""Text from a decoder: greedy, with the keys and values of earlier tokens kept."""

import functools

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.models.network import Network


def greedy(
    network: Network,
    params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    adapters=None,
    max_new_tokens: int = 16,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> jax.Array:
    """The likeliest next token, N times; ends early when every row has stopped.

    Compiles once per shape of `tokens` and N; `stop_tokens` and `pad_token` are inputs.

    Args:
      tokens: int [B, T], padded on the left.
      mask: [B, T], 0 or False where there is padding.
      stop_tokens: a row ends with the first of them, which is part of the output.

    Returns:
      int32 [B, N]; `pad_token` after the end.

    Raises:
      ConfigError: N below 1; padding at the end of a row.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    mask = jnp.asarray(mask).astype(bool)
    if not mask[:, -1].all():
        raise ConfigError("greedy continues the last token: pad prompts on the left, not the right")
    stops, pad = jnp.array(stop_tokens, jnp.int32), jnp.int32(pad_token)
    return _greedy(network, max_new_tokens, params, adapters, jnp.asarray(tokens), mask, stops, pad)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _greedy(network, count, params, adapters, tokens, mask, stops, pad):
    run = functools.partial(network, params, adapters=adapters)
    rows, width = tokens.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = run(rows, width + count, method="empty_cache")

    def following(hidden):
        return run(hidden[:, -1], method="logits").argmax(-1).astype(jnp.int32)

    def running(state):
        i, stopped, *_ = state
        return (i < count) & ~stopped.all()

    def step(state):
        i, stopped, token, written, cache = state
        written = written.at[:, i].set(jnp.where(stopped, pad, token))
        stopped = stopped | jnp.isin(token, stops)
        at = positions[:, -1:] + 1 + i
        hidden, cache = run(token[:, None], at, jnp.ones((rows, 1), bool), cache=cache)
        return i + 1, stopped, following(hidden), written, cache

    last = jnp.full((rows, 1), width - 1)
    hidden, cache = run(tokens, positions, mask, cache=cache, read=last)
    written = jnp.full((rows, count), pad)
    state = jnp.int32(0), jnp.zeros(rows, bool), following(hidden), written, cache
    return jax.lax.while_loop(running, step, state)[3]
