"""Aggregation with a rule that a minority of hostile or broken clients cannot control.

The rule needs all updates at once: a round holds [K, D] numbers, for K clients and D trained
parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.algorithm import Algorithm, State, difference, one_object, stack, wide
from fedrag_jax.federated.algorithms.fed_avg import PLAIN, server_step, whole_model
from fedrag_jax.federated.robust.rule import Rule
from fedrag_jax.federated.work import Work


@one_object
def robust(
    rule: Rule,
    *,
    server_optimizer: optax.GradientTransformation = PLAIN,
    weighting: str = "uniform",
    **work,
) -> Algorithm:
    """x ← x + rule({y_k − x}).

        robust(krum(byzantine=2), local_steps=10)

    Updates that are not finite are left out; if none is finite, the fit ends with an error. If fewer
    clients answer than the rule needs, the round does not change the model. The field `left_out` of a
    record lists the clients whose updates did not count.

    Args:
      rule: a rule of `federated.robust`.
      server_optimizer: optimizer that receives −rule({y_k − x}).
      weighting: weighting of clients, for rules that use it; a client can lie about its number of
        examples.
      work: as in `fed_avg`.

    Raises:
      ConfigError: as `Work`; in a fit, fewer clients than the rule needs.
    """

    work = Work(weighting=weighting, **work)

    def init(trainable, client_init, client_count):
        most = work.sampling.places(np.ones(client_count))
        if most < rule.least:
            raise ConfigError(
                f"{rule} needs at least {rule.least} clients in a round, but {most} of {client_count} "
                f"take part ({work.sampling.name}): sample more, or assume fewer hostile ones"
            )
        return State(trainable, server_optimizer.init(jax.tree.map(wide, trainable)))

    def turn(state, cohort, client):
        x = state.trainable

        def group(members):
            x_k = stack(x, len(members.share))
            y_k, _, report = client.update(x_k, client.init(x_k), members)
            moved = jax.vmap(_flat)(difference(y_k, x_k))
            finite = jnp.isfinite(moved).all(1) & report["finite"]
            return (), ((members.clients, members.share, moved, finite), report)

        _, rest = client.total(group, cohort)
        clients, share, moved, finite = (
            client.gather([updates[i] for updates, _ in rest]) for i in range(4)
        )
        there = (share > 0) & finite
        safe = jnp.where(there[:, None], moved, 0)
        combined, used = rule.combine(safe, jnp.where(there, share, 0), there)
        enough = there.sum() >= rule.least
        mean = _unflat(jnp.where(enough, combined, 0), x)
        counted, some = jnp.where(used & enough, clients, -1), there.any()

        def told(updates, report):
            # A client that was left out no longer ends the fit, and its metrics are not averaged.
            seen = jnp.where(report["finite"], report["examples"], 0)
            return report | {
                "finite": report["finite"] | some,
                "examples": seen,
                "left_out": ~jnp.isin(updates[0], counted),
            }

        x, server = server_step(server_optimizer, x, state.server, mean)
        return State(x, server), [told(*part) for part in rest]

    return Algorithm(work, init, (turn,), whole_model, needs="updates")


def _flat(tree) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def _unflat(vector: jax.Array, like):
    leaves, structure = jax.tree.flatten(like)
    pieces, start = [], 0
    for x in leaves:
        pieces.append(vector[start : start + x.size].reshape(x.shape))
        start += x.size
    return jax.tree.unflatten(structure, pieces)
