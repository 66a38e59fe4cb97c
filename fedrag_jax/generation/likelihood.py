"""Likelihoods of answers under a generator, the basis of all likelihood losses.

Shapes: B questions, K prompts per question (one per passage, or one with all passages), T tokens,
A answer tokens, including EOS.
"""

import jax
import jax.numpy as jnp

from fedrag_jax.models.network import Network


def answer_log_probs(decoder: Network, params, adapters, batch) -> jax.Array:
    """Returns log p(y_i | passages, x, y_<i) for every answer token: float32 [B, K, A].

    Args:
      batch: as in `answer_distributions`.
    """
    log_probs, targets = answer_distributions(decoder, params, adapters, batch)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def answer_distributions(decoder: Network, params, adapters, batch) -> tuple[jax.Array, jax.Array]:
    """Returns log p(. | passages, x, y_<i) at every answer token, float32 [B, K, A, V], and the answer
    tokens, int [B, K, A].

    Hidden states and logits are computed only where they are needed: the hidden state at t - 1 predicts
    the token at position t.

    Args:
      batch: `tokens` [B, K, T] right-padded, `lengths` [B, K], `answer_positions` [B, K, A]; or,
        packed, `tokens` [B, 1, T] with the K prompts one after another, and `segments` [B, 1, T], their
        numbers from 1, 0 for padding. Positions are indices in the row.
    """
    t = batch["tokens"].shape[-1]
    tokens = batch["tokens"].reshape(-1, t)
    index = jnp.broadcast_to(jnp.arange(t), tokens.shape)
    if "segments" in batch:
        segments = batch["segments"].reshape(-1, t)
        packed, mask, rotary = {"segments": segments}, segments > 0, _since_start(segments, index)
    else:
        packed, mask, rotary = {}, index < batch["lengths"].reshape(-1, 1), index
    positions = batch["answer_positions"].reshape(len(tokens), -1)
    targets = jnp.take_along_axis(tokens, positions, axis=1)
    read = positions - 1
    predicting = decoder(params, tokens, rotary, mask, read=read, adapters=adapters, **packed)
    logits = decoder(params, predicting, method="logits", adapters=adapters)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    shape = batch["answer_positions"].shape
    return log_probs.reshape(*shape, -1), targets.reshape(shape)


def next_log_probs(decoder: Network, params, adapters, tokens, lengths) -> jax.Array:
    """Returns log p of every token of the vocabulary after each prompt: float32 [N, V].

    Args:
      tokens: int [N, T], right-padded.
      lengths: int [N].
    """
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    last = lengths[:, None] - 1
    read = decoder(params, tokens, index, index <= last, read=last, adapters=adapters)
    logits = decoder(params, read, method="logits", adapters=adapters)
    return jax.nn.log_softmax(logits[:, 0].astype(jnp.float32))


def _since_start(segments: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the distance of each position in a row [N, T] from the start of its segment."""
    starts = jnp.diff(segments, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def tokens_read(batch) -> jax.Array:
    """Returns the tokens of each example [B] that generator and query encoder read, without padding."""
    tokens = jnp.zeros_like(batch["weight"])
    if "lengths" in batch:
        tokens += batch["lengths"].sum(1).astype(tokens.dtype)
    if "question_mask" in batch:
        tokens += batch["question_mask"].sum(1).astype(tokens.dtype)
    return tokens


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the mean of `values` [B] over the examples that are not padding; 0 if all are padding."""
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
