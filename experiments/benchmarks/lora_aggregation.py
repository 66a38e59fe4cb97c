"""Distance of each adapter aggregation rule from the exact mean of the clients' updates.

    python -m experiments.benchmarks.lora_aggregation

Eight clients (Dirichlet 0.1 over topics) tune the generator on the built-in world for one round, from
the same fresh adapters. The server's result is compared with Σ p_k s_k A_k B_k, the mean of their
updates. Prints |made - mean| / |mean| for every rank, in the Frobenius norm over all adapted layers,
and last a line of JSON.
"""

import json

import numpy as np
from absl import app, flags

_RANKS = flags.DEFINE_list("ranks", ["2", "8"], "ranks of the adapters")
_STEPS = flags.DEFINE_integer("local_steps", 20, "steps per client", lower_bound=1)
_CLIENTS = flags.DEFINE_integer("clients", 8, "clients per round", lower_bound=1)
_RATE = flags.DEFINE_float(
    "learning_rate", 2e-3, "learning rate of the clients' AdamW", lower_bound=0
)
_RULES = "fedit", "ffa", "rolora", "flora", "fedex", "flexlora"


def main(argv):
    del argv
    from fedrag_jax.data import synthetic
    from fedrag_jax.data.partition import partition
    from fedrag_jax.data.schemes import dirichlet
    from fedrag_jax.models.lora import LoraConfig
    from fedrag_jax.rag import RAGSystem

    world = synthetic.generate()
    clients = partition(world.train, dirichlet(0.1, _CLIENTS.value))
    found = {rule: {} for rule in _RULES}
    for rank in map(int, _RANKS.value):
        lora = LoraConfig(rank, 2.0 * rank)
        system = RAGSystem.build(world.passages, world.train, adapters=lora, progress=True)
        for rule in _RULES:
            found[rule][rank] = apart(system, clients, rule)
            print(f"rank {rank:3d}  {rule:9s} {found[rule][rank]:.1e}", flush=True)
    print(
        json.dumps(
            {rule: {r: float(f"{x:.2e}") for r, x in f.items()} for rule, f in found.items()}
        )
    )


def apart(system, clients, rule: str) -> float:
    """|made - mean| / |mean| after one round of a rule."""
    from fedrag_jax.federated.sampling import everyone, fixed

    # What the clients of this rule mean, each drawn alone.
    moved = "ffa" if rule in ("ffa", "rolora") else "fedit"
    shares = clients.sizes() / clients.sizes().sum()
    mean = sum(p * update(system, clients, moved, fixed(k)) for k, p in enumerate(shares))
    made = update(system, clients, rule, everyone)
    return float(np.linalg.norm(made - mean) / np.linalg.norm(mean))


def update(system, clients, rule: str, sampling) -> np.ndarray:
    """All numbers of the dense update of a round: the adapters' product and what the base took in."""
    import optax

    from fedrag_jax.federated.algorithms.fed_lora import fed_lora
    from fedrag_jax.federated.fit import fit
    from fedrag_jax.models import lora
    from fedrag_jax.models.network import flatten
    from fedrag_jax.objectives.generator import concatenated

    def rows(examples):
        return system.retriever.search([e.question for e in examples], system.top_k)[0]

    task = concatenated(
        system.decoder, system.generator.params, system.adapters, system.prompts, rows
    )
    result = fit(
        task,
        clients,
        fed_lora(rule, system.decoder, local_steps=_STEPS.value, sampling=sampling),
        rounds=1,
        batch_size=4,
        optimizer=optax.adamw(_RATE.value, weight_decay=0.0),
    )
    base = dict(flatten(system.generator.params))
    changed = dict(flatten(result.frozen["decoder"]))
    kernels = sorted(flatten(lora.product(system.decoder, result.trainable["adapters"])))
    return np.concatenate(
        [np.ravel(np.asarray(x) + (changed[path] - base[path])) for path, x in kernels]
    )


if __name__ == "__main__":
    app.run(main)
