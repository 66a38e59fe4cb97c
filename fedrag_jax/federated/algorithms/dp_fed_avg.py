"""Federated averaging with client-level differential privacy.

Learning Differentially Private Recurrent Language Models
    McMahan, Ramage, Talwar, Zhang, ICLR 2018, arXiv 1710.06963, Algorithm 1 with fixed denominators
Differentially Private Learning with Adaptive Clipping
    Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021, arXiv 1905.03871, Algorithm 1

    Δ_k = (y_k − x) · min(1, C / ‖y_k − x‖)
    x ← x + (Σ_k Δ_k + N(0, (z C)² I)) / (q N)

The sum is over clients that are sampled independently with probability q, so one client changes the sum
by at most C, whichever other clients take part. With a quantile γ, the clip follows it at a rate η:

    b = ½ + (Σ_k (1[‖y_k − x‖ ≤ C] − ½) + N(0, σ_b²)) / (q N)
    C ← C exp(−η (b − γ))

and the noise multiplier of the sum becomes z_Δ = (z⁻² − (2 σ_b)⁻²)^−½, so that sum and counts together
spend as much as z alone.

Locally private clients trust no server: each adds N(0, (z C)² I) to its own Δ_k. Any two updates of one
client differ by at most 2 C, so a round spends what a multiplier of z / 2 does (every client is a data
set of one; Dwork and Roth 2014, Foundations and Trends 9, section 12.1).
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    difference,
    normal_like,
    one_object,
    plus,
    positive,
    stack,
    weighted_sum,
    wide,
)
from fedrag_jax.federated.algorithms.fed_avg import PLAIN, server_step, whole_model
from fedrag_jax.federated.privacy.accounting import calibrated_noise
from fedrag_jax.federated.privacy.accounting import epsilon as spent
from fedrag_jax.federated.sampling import everyone, poisson
from fedrag_jax.federated.work import Work

NAME = "dp_fed_avg"


@one_object
def dp_fed_avg(
    *,
    clip: float = 1.0,
    noise_multiplier: float = 1.0,
    rate: float = 1.0,
    delta: float = 0.0,
    epsilon: float = 0.0,
    calibrate_for: int = 0,
    accountant: str = "rdp",
    quantile: float = 0.0,
    clip_rate: float = 0.2,
    count_noise: float = 0.0,
    local: bool = False,
    server_optimizer: optax.GradientTransformation = PLAIN,
    weighting: str = "uniform",
    **work,
) -> Algorithm:
    """Averages clipped updates with noise. With a δ, records have the `epsilon` spent so far.

    The work of a client in a round (steps, stragglers, dropout) is unrestricted.

    Args:
      clip: C, the maximum norm over all trained parameters; with a quantile, its initial value.
      noise_multiplier: z; ignored if it is calibrated.
      rate: q; every client takes part with this probability.
      delta: δ, below 1/N; 0 makes no claim.
      epsilon: maximum ε: a fit of more rounds than it allows is refused. 0 sets no maximum.
      calibrate_for: number of rounds; the noise is the least that spends at most ε over them.
      accountant: "rdp" or "pld", as in `privacy.accounting`.
      quantile: γ in (0, 1), the target share of unclipped updates; 0 keeps C constant.
      clip_rate: η, the rate of the clip.
      count_noise: σ_b; 0 uses q N / 20, as in the paper.
      local: whether each client adds noise of z C to its own message. ε is then that of a client that
        takes part in every round, against the server too: the server knows who is sampled, so sampling
        amplifies nothing.
      server_optimizer: optimizer that receives the noisy pseudo-gradient.
      weighting: must be "uniform".
      work: as in `fed_avg`, without `sampling`, which is `poisson(rate)`.

    Raises:
      ConfigError: a violated assumption, with the reason; also as `Work` and accounting.
    """
    positive(NAME, clip=clip, clip_rate=clip_rate)
    if not 0 < rate <= 1:
        raise ConfigError(f"{NAME}: rate must be in (0, 1], got {rate}")
    if work.pop("sampling", everyone) != everyone:
        raise ConfigError(
            f"{NAME}: ε requires clients that are sampled independently; leave "
            "`sampling` (or participation) out and give `rate`"
        )
    if weighting != "uniform":
        raise ConfigError(
            f"{NAME}: weighting={weighting!r} makes a client's share depend on other clients' data, so "
            'the clip no longer bounds its effect; use weighting="uniform"'
        )
    if not 0 <= quantile < 1 or count_noise < 0 or noise_multiplier < 0:
        raise ConfigError(
            f"{NAME}: quantile must be in [0, 1), count_noise and noise_multiplier at least 0, got "
            f"{quantile}, {count_noise} and {noise_multiplier}"
        )
    if local and quantile:
        raise ConfigError(
            f"{NAME}: a quantile needs to know which updates exceed the clip, and local=True would not "
            "hide this; set quantile=0"
        )
    if (epsilon or calibrate_for) and not delta:
        raise ConfigError(f"{NAME}: an ε needs a δ: give delta, below 1 / number of clients")
    seen_at, apart = (1.0, 2.0) if local else (rate, 1.0)  # of the clip, two neighbours' messages
    if calibrate_for:
        noise_multiplier = apart * calibrated_noise(
            epsilon, seen_at, calibrate_for, delta, accountant
        )
    if delta:  # refuses what it cannot account for
        spent(noise_multiplier / apart, seen_at, 1, delta, accountant)
    work = Work(sampling=poisson(rate) if rate < 1 else everyone, weighting=weighting, **work)
    z = noise_multiplier

    def init(trainable, client_init, client_count):
        if delta >= 1 / client_count:
            raise ConfigError(
                f"{NAME}: delta {delta} is not below 1/{client_count}, and would allow the model to "
                "reveal one client completely; lower it, or use more clients"
            )
        noise = _count_noise(client_count)
        if quantile and z >= 2 * noise:
            raise ConfigError(
                f"{NAME}: noise_multiplier {z:.4g} must be below twice the noise of the counts, "
                f"{noise:.4g}; raise count_noise, lower noise_multiplier or set quantile=0"
            )
        server = {
            "optimizer": server_optimizer.init(jax.tree.map(wide, trainable)),
            "clip": jnp.float32(clip),
            "clients": jnp.float32(client_count),
        }
        return State(trainable, server)

    def _count_noise(clients):
        return count_noise or rate * clients / 20

    def turn(state, cohort, client):
        x, c, clients = state.trainable, state.server["clip"], state.server["clients"]
        expected = rate * clients
        key = jax.random.fold_in(client.key, zlib.crc32(b"privacy"))

        def group(members):
            x_k = stack(x, len(members.share))
            y_k, _, report = client.update(x_k, client.init(x_k), members)
            moved = difference(y_k, x_k)
            squares = [jnp.square(x).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(moved)]
            norm = jnp.sqrt(sum(squares[1:], squares[0])).astype(c.dtype)
            there = members.share > 0
            scale = jnp.where(there, _shrinking(norm, c), 0)
            below = jnp.where(there, (norm <= c) - 0.5, 0).sum()
            clipped = (norm > c).astype(c.dtype)
            told = {"clipped": clipped, "clip": jnp.broadcast_to(c, norm.shape)}
            report = report | {"metrics": report["metrics"] | told}
            sent = weighted_sum(scale, moved)
            if local:
                own = jax.vmap(jax.random.fold_in, (None, 0))(key, members.clients)
                noise = weighted_sum(there * z * c, jax.vmap(normal_like)(own, moved))
                sent = jax.tree.map(jnp.add, sent, noise)
            return (sent, below), report

        (total, below), report = client.total(group, cohort)
        of_sum, of_counts = jax.random.split(key)
        deviation = z * c * (not local)
        if quantile:
            counts = _count_noise(clients)
            deviation = c * (z**-2 - (2 * counts) ** -2) ** -0.5 if z else 0 * c
            told = below + counts * jax.random.normal(of_counts)
            c = c * jnp.exp(-clip_rate * (0.5 + told / expected - quantile))
        mean = jax.tree.map(
            lambda x, noise: (x + deviation.astype(x.dtype) * noise) / expected.astype(x.dtype),
            total,
            normal_like(of_sum, total),
        )
        x, optimizer = server_step(server_optimizer, x, state.server["optimizer"], mean)
        return State(x, state.server | {"optimizer": optimizer, "clip": c}), report

    def record_fields(rounds):
        if not delta:
            return {}
        found = spent(z / apart, seen_at, rounds, delta, accountant)
        if epsilon and found > epsilon * (1 + 1e-3):
            raise ConfigError(
                f"{NAME}: {rounds} rounds spend an ε of {found:.4g}, more than the claimed "
                f"{epsilon:g}; use fewer rounds, more noise, or calibrate_for this number of rounds"
            )
        return {"epsilon": found, "delta": delta}

    return Algorithm(
        work,
        init,
        (turn,),
        whole_model,
        record_fields=record_fields,
        simulated="each client's noise is drawn from a seed that the server knows" if local else "",
        secret=True,
        # A clip that follows the norms needs to see them.
        bounded=None if quantile else _clipping(clip),
        open_server=False,
    )


def _shrinking(norm: jax.Array, c) -> jax.Array:
    """min(1, C / norm)."""
    return jnp.minimum(1, c / jnp.where(norm > 0, norm, 1))


@functools.cache
def _clipping(clip: float):
    def clipped(y, x):
        moved = difference(y, x)
        norm = jnp.sqrt(sum(jnp.square(u).sum() for u in jax.tree.leaves(moved)))
        scale = _shrinking(norm, clip)
        return plus(x, jax.tree.map(lambda u: scale * u, moved))

    return clipped
