"""The loss of federated fine-tuning with skew, many clients, many local steps, or low participation.

Each factor is varied alone around the federated regime of configs/compare_strategies.py, with the same
number of training examples.

    python -m experiments heterogeneity
    python -m experiments heterogeneity \
        --config.name=alpha --config.factors.alpha="(0.05, 0.5, 5.0)" --config.factors.clients="()"
"""

from ml_collections import ConfigDict

from configs import compare_strategies, settings


def get_config() -> ConfigDict:
    config = settings.base()
    settings.matched_alone(config)
    config.name = "heterogeneity"
    config.seeds = (0, 1, 2, 3, 4)
    config.strategies = ("none", "retriever", "joint_token")
    config.regimes = ("federated",)
    config.equivalence_margin = 2.0  # in points; choose it before a run
    config.mode = (
        "concatenated"  # how questions are answered, see fedrag_jax/generation/inference.py
    )
    config.learning_rates = compare_strategies.learning_rates()

    # Values of each factor in addition to the config's own; () does not vary the factor. The number of
    # rounds changes so that clients x local_steps x rounds stays constant.
    config.factors = ConfigDict(
        {
            "alpha": (0.03, 0.3, 1.0, float("inf")),
            "clients": (2, 4, 16, 32),
            "local_steps": (1, 6, 12, 24),
            "participation": (0.125, 0.25, 0.5),
        }
    )
    # Factors of the config's learning rates. One is chosen at each point on this number of validation
    # questions, with the first two seeds. If the best factor is at an end, the search continues beyond
    # it; the best is refined to a factor of two.
    config.rate_factors = (0.25, 1.0, 4.0)
    config.validation_questions = 400
    return config
