"""Federated averaging of low-rank adapters: rules that combine the clients' A_k and B_k.

The update of a client is s_k A_k B_k, with its own scale s_k = alpha / r_k. The mean of the factors is
not the mean of the updates: (Σ p_i A_i)(Σ p_j B_j) has cross terms A_i B_j of different clients. The
rules differ in how they treat this error.

| rule | clients train | the server computes | the mean update is |
|---|---|---|---|
| `fedit` | A, B | the means of A and of B | missed |
| `ffa` | B | the mean of B; A keeps its initial value | exact |
| `rolora` | B and A in turn | the mean of the trained factor | exact |
| `flora` | A, B | base + Σ p_k s_k A_k B_k, and fresh adapters | exact |
| `fedex` | A, B | the means; base + the error of the means | exact |
| `flexlora` | A, B | the SVD of Σ p_k s_k A_k B_k, truncated to the rank | approximate |
| `fedsa` | A, B | the mean of A; B stays with the client | personal |

FedIT: Zhang et al. 2023, arXiv 2305.05644. FFA-LoRA: Sun et al. 2024, 2403.12313. RoLoRA: Chen et al.
2025, 2502.01755. FLoRA: Wang et al. 2024, 2409.05976. FedEx-LoRA: Singhal et al. 2025, 2410.09432.
FlexLoRA: Bai et al. 2024, 2402.11505. FedSA-LoRA: Guo et al. 2025, 2410.01463.

Other trained parts, such as a query encoder, are averaged as in `fed_avg`.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import (
    Algorithm,
    State,
    Traffic,
    added,
    by_kind,
    difference,
    one_object,
    plus,
    stack,
    weighted_sum,
    wide,
)
from fedrag_jax.federated.work import Work, WorkOptions
from fedrag_jax.models import lora
from fedrag_jax.models.network import Network, flatten, unflatten
from fedrag_jax.models.quantized import is_quantized

A, B = "lora_a", "lora_b"


class Rule(NamedTuple):
    """One row of the table above.

    Attributes:
      moves: the trained factors, for each of the turns that alternate over the rounds.
      private: factors that never leave their client.
      settle: `settle(network, adapters, product, key) -> (adapters, change of the base or None)`,
        from the mean factors and the mean update; None keeps the mean factors.
      changes_base: whether `settle` changes the base.
      mixed_ranks: whether clients may have different ranks.
    """

    moves: tuple[tuple[str, ...], ...] = ((A, B),)
    private: tuple[str, ...] = ()
    settle: Callable | None = None
    changes_base: bool = False
    mixed_ranks: bool = False


def _stacked(network, adapters, product, key):
    """FLoRA: the concatenated factors of all clients give the mean update, which is added to the
    base."""
    fresh = lora.init_adapters(network, jax.random.fold_in(key, zlib.crc32(b"fresh adapters")))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, adapters), product


def _residual(network, adapters, product, key):
    """FedEx-LoRA: the error of the means is added to the base."""
    kept = lora.product(network, jax.tree.map(wide, adapters))
    return adapters, jax.tree.map(jnp.subtract, product, kept)


def _nearest(network, adapters, product, key):
    """FlexLoRA: the best low-rank factors of the mean update. A is orthonormal, so that a direction of
    zero weight can be learned again, as at the start of LoRA."""
    return lora.factorize(network, product, adapters), None


RULES = {
    "fedit": Rule(),
    "ffa": Rule(moves=((B,),)),
    "rolora": Rule(moves=((B,), (A,))),
    "flora": Rule(settle=_stacked, changes_base=True, mixed_ranks=True),
    "fedex": Rule(settle=_residual, changes_base=True),
    "flexlora": Rule(settle=_nearest, mixed_ranks=True),
    "fedsa": Rule(private=(B,)),
}


@one_object
def fed_lora(
    rule: str,
    network: Network,
    *,
    ranks: tuple[int, ...] | None = None,
    part: str = "adapters",
    base: str = "decoder",
    **work: Unpack[WorkOptions],
) -> Algorithm:
    """Averages adapters by one of seven rules.

    Args:
      rule: "fedit", "ffa", "rolora", "flora", "fedex", "flexlora" or "fedsa".
      network: the network of the adapters, from `lora.add_lora`.
      ranks: rank of each client's adapters, at most that of the network; alpha is the same for all, so
        that the scale of client k is alpha / r_k. Only for rules that never average factors.
      part: name of the adapters in the trainable pytree.
      base: name of the network's parameters in the frozen pytree.
      work: as in `fed_avg`.

    Raises:
      ConfigError: an unknown rule, or ranks that the rule or the network does not support; as `Work`;
        in a fit, a rule that would change a quantised base.
    """
    settled = Work(**work)
    if rule not in RULES:
        raise ConfigError(f"fed_lora: rule is one of {sorted(RULES)}, got {rule!r}")
    if network.lora is None:
        raise ConfigError("fed_lora needs a network with adapters: call add_lora first")
    rules = RULES[rule]
    if ranks is not None:
        _require_ranks(rule, network, ranks)
    full = network.lora.rank

    def init(trainable, client_init, client_count):
        if part not in trainable:
            raise ConfigError(
                f"fed_lora: the task trains {[*trainable]}, not {part!r}; name the adapters "
                "with `part`"
            )
        if ranks is not None and len(ranks) != client_count:
            raise ConfigError(f"fed_lora: {len(ranks)} ranks for {client_count} clients")
        shared, private = _parted(trainable, part, rules.private)
        server = ()
        if rules.changes_base:
            adapters = jax.tree.map(wide, trainable[part])
            server = jax.tree.map(jnp.zeros_like, lora.product(network, adapters))
        return State(shared, server, private if rules.private else ())

    def turn(moves, state, cohort, client):
        still = tuple({A, B} - {*moves})
        x, fixed = _parted(state.trainable, part, still)
        frozen = changed(state, client.frozen)

        def see(y, rank):
            adapters = _joined(y, fixed)[part]
            return y | {part: adapters if ranks is None else _scaled(adapters, full / rank)}

        def group(members, private):
            rank = ()
            x_k = stack(x, len(members.share))
            if private:
                x_k = _joined(x_k, private)
            if ranks is not None:
                rank = jnp.take(jnp.array(ranks, float), members.clients, mode="clip")
                x_k = x_k | {part: jax.vmap(_cut)(x_k[part], rank, rank / full)}
            y_k, _, report = client.update(
                x_k, client.init(x_k), members, rank, see=see, frozen=frozen
            )
            (y_k, private), (x_k, _) = (_parted(t, part, rules.private) for t in (y_k, x_k))
            sums = weighted_sum(members.share, difference(y_k, x_k)), ()
            if rules.settle is not None:
                seen = jax.vmap(see)(y_k, rank)[part]
                sums = sums[0], (_mean_product(network, members.share, seen), members.share.sum())
            return sums, (private if rules.private else (), report)

        rows = state.population or [()] * len(cohort)
        (update, products), rest = client.total(group, cohort, rows)
        population, report = (list(part) for part in zip(*rest, strict=True))
        new, server = _joined(plus(x, update), fixed), state.server
        if rules.settle is not None:
            product, weight = products
            # If no client answered, the old adapters count.
            before = lora.product(network, jax.tree.map(wide, state.trainable[part]))
            product = jax.tree.map(
                lambda m, d: m + (1 - weight).astype(m.dtype) * d, product, before
            )
            adapters, change = rules.settle(network, new[part], product, client.key)
            new = new | {part: adapters}
            if change is not None:
                server = jax.tree.map(jnp.add, server, change)
        return State(new, server, population if rules.private else ()), report

    def changed(state, frozen):
        if not rules.changes_base:
            return frozen
        if base not in frozen:
            raise ConfigError(
                f"fed_lora: the frozen parts are {[*frozen]}, not {base!r}; name the parameters of "
                "the network with `base`"
            )
        if is_quantized(frozen[base]):
            raise ConfigError(
                f"fed_lora: {rule} changes the base, but this base is quantised; use a rule that does "
                f"not ({', '.join(name for name, r in RULES.items() if not r.changes_base)}) "
                "or load the base without quantize"
            )
        return frozen | {base: lora.add_product(frozen[base], state.server)}

    # Assumes that every client took part in the previous round: each round's changes go down once.
    def traffic(trainable, drawn, answered, round):
        moves = rules.moves[round % len(rules.moves)]
        _, factors = _parted(trainable, part, moves)
        others = by_kind(_parted(trainable, part, (A, B))[0])

        def factors_of(client, name=part):
            rank = full if ranks is None else ranks[client]
            whole = by_kind({name: factors[part]})
            return {kind: size * rank // full for kind, size in whole.items()}

        stacked = {}
        if rules.changes_base:
            # Down: the factors of all clients, or their sum if that is smaller.
            update = f"{base} update"
            dense = jax.eval_shape(lambda t: lora.product(network, t), trainable[part])
            of_all = added(factors_of(k, update) for k in answered)
            stacked = min(of_all, by_kind({update: dense}), key=lambda sizes: sum(sizes.values()))
        keeps = rule != "flora"  # whose fresh adapters every client can draw by itself
        return Traffic(
            down=added(
                some for k in drawn for some in (others, factors_of(k) if keeps else {}, stacked)
            ),
            up=added(some for k in answered for some in (others, factors_of(k))),
        )

    def sent(trainable, turn):
        return _parted(trainable, part, tuple({A, B} - {*rules.moves[turn]} | {*rules.private}))[0]

    def model(trainable, row):
        return _joined(trainable, row)

    return Algorithm(
        settled,
        init,
        tuple(functools.partial(turn, moves) for moves in rules.moves),
        traffic,
        model=model if rules.private else None,
        frozen=changed,
        changes_base=rules.changes_base,
        sent=sent if ranks is None else None,
        needs="sum" if rules.settle is None else "factors",
    )


def _parted(trainable: dict, part: str, names: tuple[str, ...]) -> tuple[dict, dict]:
    """Splits the trainable pytree into everything but the factors, and the factors."""
    inside, outside = [], []
    for path, leaf in flatten(trainable[part]):
        (inside if path[-1] in names else outside).append((path, leaf))
    return trainable | {part: unflatten(outside)}, {part: unflatten(inside)}


def _joined(trainable: dict, factors: dict) -> dict:
    """Undoes `_parted`."""
    both = {
        part: unflatten([*flatten(trainable[part]), *flatten(factors[part])]) for part in factors
    }
    return trainable | both


def _scaled(adapters: dict, factor: jax.Array) -> dict:
    """Multiplies every B by a number."""
    return unflatten(
        (path, x * factor.astype(x.dtype) if path[-1] == B else x) for path, x in flatten(adapters)
    )


def _cut(adapters: dict, rank: jax.Array, factor: jax.Array) -> dict:
    """Keeps the first `rank` columns of A and rows of B, sets the rest to zero, and scales B by
    `factor`."""

    def cut(path, x):
        axis = x.ndim - (1 if path[-1] == A else 2)
        places = jax.lax.broadcasted_iota(rank.dtype, x.shape, axis)
        return x * (places < rank).astype(x.dtype)

    return _scaled(unflatten((path, cut(path, x)) for path, x in flatten(adapters)), factor)


def _mean_product(network: Network, share: jax.Array, adapters: dict) -> dict:
    """Returns Σ_k p_k s A_k B_k for adapters [g, ...]: the product of the concatenated columns A_1 A_2
    ... and the concatenated rows p_1 B_1, p_2 B_2, ..."""

    def stacked(path, x):
        x = wide(x)
        if path[-1] == A:
            x = jnp.moveaxis(x, 0, -2)  # [..., in, g, r]
            return x.reshape(*x.shape[:-2], -1)
        x = jnp.moveaxis(jax.vmap(jnp.multiply)(share.astype(x.dtype), x), 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    return lora.product(network, unflatten((p, stacked(p, x)) for p, x in flatten(adapters)))


def _require_ranks(rule: str, network: Network, ranks: tuple[int, ...]) -> None:
    if not RULES[rule].mixed_ranks:
        able = [name for name, r in RULES.items() if r.mixed_ranks]
        raise ConfigError(
            f"fed_lora: {rule} averages factors, which must have the same rank; leave ranks out or use "
            f"{' or '.join(able)}"
        )
    if network.lora.patterns:
        raise ConfigError(
            "fed_lora: `ranks` cannot be combined with rank patterns of single layers; leave either out"
        )
    if min(ranks) < 1 or max(ranks) > network.lora.rank:
        raise ConfigError(
            f"fed_lora: ranks must be from 1 to that of the network, {network.lora.rank}, got {ranks}"
        )
