"""Shared parts of the programs that make the built-in checkpoints: worlds, loss, training step."""

import functools

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.data import synthetic

WORLDS = [
    synthetic.WorldConfig(
        seed=seed,
        side="pretraining",
        crowding=1.5,
        jargon=0.0,
        chatter=0.0,
        questions=(6000, 240, 240),
    )
    for seed in range(8)
]


def decoder_loss(network, params, batch):
    """Weighted mean NLL, and for each row whether its answers are all right."""
    tokens, positions, weight = batch["tokens"], batch["positions"], batch["weight"]
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = network(params, tokens, index, jnp.ones(tokens.shape, bool))
    hidden = jnp.take_along_axis(hidden, positions[..., None] - 1, axis=1)
    logits = network(params, hidden, method="logits")
    target = jnp.take_along_axis(tokens, positions, axis=1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    right = jnp.all((logits.argmax(-1) == target) | (weight < 1), axis=1)
    return (nll * weight).sum() / weight.sum(), right


def trainer(loss, learning_rate, steps, b2):
    """A jitted step of AdamW: warm-up, a flat stretch, cosine decay over the last three tenths."""
    warm, flat = steps // 30, steps * 7 // 10
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0, learning_rate, warm),
            optax.constant_schedule(learning_rate),
            optax.cosine_decay_schedule(learning_rate, steps - flat, 0.02),
        ],
        [warm, flat],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=b2, weight_decay=0.01)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, extra

    return optimizer.init, step
