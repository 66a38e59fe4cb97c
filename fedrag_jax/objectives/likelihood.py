"""What a generator thinks of an answer: the array every likelihood loss is a few lines over.

Shapes: B questions, K prompts a question (one a passage, or one with all passages), T tokens,
A answer tokens, EOS included.
"""

import jax
import jax.numpy as jnp

from fedrag_jax.models.network import Network


def answer_log_probs(decoder: Network, params, adapters, batch) -> jax.Array:
    """log p(y_i | passages, x, y_<i) for every answer token: float32 [B, K, A].

    Logits are computed where they are needed alone: the hidden state that predicts the token at
    position t is the one at t - 1, so those are gathered before the vocabulary product.

    Args:
      batch: `tokens` [B, K, T] right-padded, `lengths` [B, K], `answer_positions` [B, K, A].
    """
    b, k, t = batch["tokens"].shape
    tokens = batch["tokens"].reshape(b * k, t)
    index = jnp.broadcast_to(jnp.arange(t), tokens.shape)
    mask = index < batch["lengths"].reshape(b * k, 1)
    hidden = decoder(params, tokens, index, mask, adapters=adapters)

    positions = batch["answer_positions"].reshape(b * k, -1)
    targets = jnp.take_along_axis(tokens, positions, axis=1)
    predicting = jnp.take_along_axis(hidden, positions[..., None] - 1, axis=1)
    logits = decoder(params, predicting, method="logits", adapters=adapters)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    return chosen.reshape(b, k, -1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of `values` [B] over the examples that are not padding; 0 if all are."""
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
