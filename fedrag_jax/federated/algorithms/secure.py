"""Simulated secure aggregation: the server sees only the sum of the clients' messages.

Practical Secure Aggregation for Privacy-Preserving Machine Learning
    Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, CCS 2017, IACR 2017/281

The contribution of client k to a sum is encoded as 32-bit integers, and each pair of clients shares a
mask:

    m_k = ⌊2^f u_k⌉ + Σ_{j > k} PRG(s_kj) − Σ_{j < k} PRG(s_jk)   mod 2³²

Masks cancel in Σ_k m_k. The masks that survivors share with dropped clients do not cancel: the server
learns the seeds of these pairs from the survivors (which hold shares of them) and removes the masks.
Keys, shares, and the second mask of each client (against a server that lies about dropped clients) are
not simulated.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, Traffic, Turn
from fedrag_jax.federated.engine.client import all_finite

WHY = {
    "updates": "needs every single update, which a sum does not reveal",
    "factors": "multiplies the factors of each client, which a sum of factors does not reveal",
    "nothing": "sends nothing that could be summed",
    "masked": "masks its sums already",
}


@functools.cache
def secure(algorithm: Algorithm, *, bits: int = 20, threshold: float = 2 / 3) -> Algorithm:
    """Returns the algorithm with masked integers, for algorithms that need only a sum.

    Clients train one by one, and each pair draws a mask as long as the message, so the time of a round
    grows with the square of its number of clients. Clients drop out after the masks have been agreed
    upon; the field `dropped` of a record lists them.

    Args:
      bits: f; a value is rounded to a multiple of 2^−f, and clipped to ±2^(31−f) / K. Those of
        private algorithms are rounded towards zero, so that no message is longer than their clip.
      threshold: minimum share of a round's clients that must survive; with fewer, the seeds cannot be
        reconstructed, and the round changes nothing.

    Raises:
      ConfigError: an algorithm that needs more than a sum, bits outside 1 to 30, a threshold outside
        (0, 1]; in a fit, a round of fewer than two clients, whose sum would be an update.
    """
    if algorithm.needs != "sum" or algorithm.model is not None:
        why = WHY.get(algorithm.needs, "leaves models with its clients")
        raise ConfigError(
            f"secure: {algorithm.name} {why}; secure aggregation is for algorithms that need only a "
            "sum, such as fed_avg, fed_adam, scaffold or dp_fed_avg"
        )
    if not 1 <= bits <= 30:
        raise ConfigError(f"secure: bits must be from 1 to 30, got {bits}")
    if not 0 < threshold <= 1:
        raise ConfigError(f"secure: threshold must be in (0, 1], got {threshold}")
    work = algorithm.work

    def init(trainable, client_init, client_count):
        most = work.sampling.places(np.ones(client_count))
        if most < 2:
            raise ConfigError(
                f"secure: {most} of {client_count} clients take part in a round "
                f"({work.sampling.name}), and the sum over one is its update; sample at least 2"
            )
        return algorithm.init(trainable, client_init, client_count)

    def traffic(trainable, drawn, answered, round):
        plain = algorithm.traffic(trainable, drawn, answered, round)
        return Traffic(plain.down, dict(_as_integers(*item) for item in plain.up.items()))

    rounded = jnp.trunc if algorithm.secret else jnp.round
    turns = tuple(_masked(turn, bits, threshold, work.dropout, rounded) for turn in algorithm.turns)
    return algorithm._replace(
        work=dataclasses.replace(work, dropout=0.0),  # they drop out within the round
        init=init,
        turns=turns,
        traffic=traffic,
        needs="masked",
        simulated="its masks are drawn from a seed that the server knows",
        name=f"secure({algorithm.name}, bits={bits}, threshold={threshold:.3g})",
    )


@functools.cache
def _masked(
    turn: Turn, bits: int, threshold: float, dropout: float, rounded: Callable[[Any], jax.Array]
) -> Turn:
    def masked(state, cohort, client):
        shapes = [part.clients.shape for part in cohort]
        cohort = [_one_by_one(part) for part in cohort]
        rows = [_one_by_one(row) for row in state.population]
        key = jax.random.fold_in(client.key, zlib.crc32(b"secure aggregation"))

        clients, share = (
            client.gather([getattr(p, n) for p in cohort]) for n in ("clients", "share")
        )
        there = share > 0
        alive = there & _survives(key, clients, dropout)
        enough = alive.sum() >= jnp.asarray(_least(threshold, len(clients)))[there.sum()]
        alive = alive & enough
        counted = jnp.where(alive, share, 0).sum()

        def surviving(part):
            mine = _survives(key, part.clients, dropout) & enough
            share = jnp.where(mine, part.share / jnp.where(counted > 0, counted, 1), 0)
            return part._replace(share=share, steps=jnp.where(mine, part.steps, 0))

        # The largest float32 whose sum over all clients fits into 32 bits.
        most = float(np.nextafter(np.float32(2**31 / len(clients)), np.float32(0)))
        whole = []  # of each sum, by part of the cohort: whether each message was finite

        def mask(number, others, shapes):
            """Sums the masks that a client shares with others: + for larger client numbers, − for
            smaller."""

            def add(j, total):
                other = clients[j]
                low, high = jnp.minimum(number, other), jnp.maximum(number, other)
                pair = jax.random.fold_in(jax.random.fold_in(key, low), high)
                sign = jnp.where(number < other, 1, -1).astype(jnp.uint32)
                sign = jnp.where(others[j] & (other != number), sign, 0)
                leaves, structure = jax.tree.flatten(total)
                drawn = [
                    leaf + sign * jax.random.bits(jax.random.fold_in(pair, i), leaf.shape)
                    for i, leaf in enumerate(leaves)
                ]
                return jax.tree.unflatten(structure, drawn)

            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.uint32), shapes)
            return jax.lax.fori_loop(0, len(clients), add, zero)

        def total(work, parts, *inputs):
            def message(members, *own):
                sums, rest = work(members, *own)
                number = members.clients[0]
                sent = jax.tree.map(lambda x: _to_integers(rounded(x * 2.0**bits), most), sums)
                sent = jax.tree.map(jnp.add, sent, mask(number, there, sums))
                # Of clients that dropped out, and of padding, nothing arrives.
                arrives = members.share > 0
                sent = jax.tree.map(lambda x: arrives[0].astype(jnp.uint32) * x, sent)
                # Integers do not show what was not finite, or of which type the sums were.
                types = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), sums)
                return sent, (rest, all_finite(sums) | ~arrives, types)

            found, rest = client.total(message, parts, *inputs)
            rest, finite, (types, *_) = zip(*rest, strict=True)
            whole.append(finite)

            def recover(j, found):
                # What survivors share with one that dropped out is the opposite of its own masks.
                lost = (there[j] & ~alive[j]).astype(jnp.uint32)
                return jax.tree.map(
                    lambda x, m: x + lost * m, found, mask(clients[j], alive, found)
                )

            found = jax.lax.fori_loop(0, len(clients), recover, found)
            return jax.tree.map(
                lambda x, like: _from_integers(x, bits, like.dtype), found, types
            ), list(rest)

        surviving_cohort = [surviving(part) for part in cohort]
        inner = state._replace(population=rows or ())
        state, report = turn(inner, surviving_cohort, client._replace(total=total))
        well = [functools.reduce(jnp.logical_and, part) for part in zip(*whole, strict=True)]
        report = [
            told | {"dropped": part.share == 0, "finite": told["finite"] & finite}
            for told, part, finite in zip(report, surviving_cohort, well, strict=True)
        ]
        population = _in_groups(state.population, shapes) if state.population else ()
        return state._replace(population=population), _in_groups(report, shapes)

    return masked


def _one_by_one(tree):
    """Reshapes leaves [G, g, ...] to [G g, 1, ...], so that each group sum covers one client."""
    return jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), tree)


def _in_groups(trees: list, shapes: list) -> list:
    """Undoes `_one_by_one` for the parts of a cohort."""
    return [
        jax.tree.map(lambda x, shape=shape: x.reshape(*shape, *x.shape[2:]), tree)
        for tree, shape in zip(trees, shapes, strict=True)
    ]


def _survives(key: jax.Array, clients: jax.Array, dropout: float) -> jax.Array:
    """Returns whether each client stays until the end of the round; the same wherever it is called."""
    if not dropout:
        return jnp.ones(clients.shape, bool)
    chance = jax.random.fold_in(key, zlib.crc32(b"dropout"))
    flat = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(chance, k)))(
        clients.reshape(-1)
    )
    return flat.reshape(clients.shape) >= dropout


def _least(threshold: float, most: int) -> np.ndarray:
    """Returns the number of survivors that a round of 0 to `most` clients needs, int32 [most + 1]."""
    # Rounding may put a whole number such as 2/3 x 3 a little above itself.
    return np.maximum(2, np.ceil(threshold * np.arange(most + 1) - 1e-9)).astype(np.int32)


def _to_integers(x: jax.Array, most: float) -> jax.Array:
    fixed = jnp.clip(x, -most, most)
    return jax.lax.bitcast_convert_type(fixed.astype(jnp.int32), jnp.uint32)


def _from_integers(x: jax.Array, bits: int, dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32).astype(dtype) * 2.0**-bits


def _as_integers(kind: str, size: int) -> tuple[str, int]:
    part, dtype = kind.rsplit(" ", 1)
    return f"{part} uint32", size // jnp.dtype(dtype).itemsize * 4
