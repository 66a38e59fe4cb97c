"""Models of clients' own, against one federated model and against models that clients train alone.

Each client's model answers questions about the client's own topics.

    python -m experiments personalisation
    python -m experiments personalisation --config.strategies="('retriever',)"
"""

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    config = settings.base()
    config.name = "personalisation"
    config.seeds = (0, 1, 2)
    config.data.own_questions = 0
    del (
        config.federated.algorithm,
        config.federated.algorithm_options,
    )  # the methods below have theirs
    config.strategies = ("retriever", "generator")
    # By name: the algorithm (fedrag_jax/federated/algorithms/by_name.py), its options, the strategies
    # that it suits (() is all), and the trained parts if they are not those of the strategy.
    # `local_converged` is no algorithm: each client trains alone until validation stops improving.
    config.methods = ConfigDict(
        {
            "federated": {"algorithm": "fedavg"},
            "fine_tuned": {"algorithm": "fine_tuned", "options": {"together": 24, "alone": 8}},
            "ditto": {"algorithm": "ditto", "options": {"lam": 0.1}},
            "ditto_1": {"algorithm": "ditto", "options": {"lam": 1.0}},
            "local_head": {
                "algorithm": "local_parts",
                "options": {"private": ("head",)},
                "strategies": ("retriever",),
                "parts": ("query", "head"),
            },
            "fedsa": {"algorithm": "fedsa", "strategies": ("generator",)},
            "local_converged": {},
        },
        sort_keys=False,
    )
    # Every client takes rounds x local_steps steps; one that trains alone may take as many as all
    # clients together.
    config.training.rounds, config.training.converged.cap = 32, 1
    # Learning rates of the first round, which decay linearly; for fine-tuning, of the first round alone
    # (before it, that of the federated model). For each strategy and method the rate
    # with the best score on validation questions about clients' own topics is chosen, with the first
    # pair of seeds. If the best rate is at an end, the search continues; it refines to a factor of two.
    config.learning_rates = (4e-4, 1.6e-3, 6.4e-3)
    config.validation_questions = 400
    return config
