"""What federated fine-tuning loses as clients differ, are many, work long, or seldom take part.

Each factor is varied by itself around the federated regime of configs/compare_strategies.py, at the
same number of training examples.

    python -m experiments heterogeneity
    python -m experiments heterogeneity \
        --config.name=alpha --config.factors.alpha="(0.05, 0.5, 5.0)" --config.factors.clients="()"
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "heterogeneity"
    config.seeds = (0, 1, 2, 3, 4)
    config.strategies = ("none", "retriever", "joint_token")
    config.regimes = ("federated",)

    # Values of each factor beside that of the rest of the config; () leaves the factor alone. Rounds
    # follow from clients x local_steps x rounds, which stays what the config has.
    config.factors = ConfigDict(
        {
            "alpha": (0.03, 0.3, 1.0, float("inf")),
            "clients": (2, 4, 16, 32),
            "local_steps": (1, 6, 12, 24),
            "participation": (0.125, 0.25, 0.5),
        }
    )
    # At each point the learning rates of the config times one of these, chosen on so many validation
    # questions with the first two seeds; an end that is best is gone beyond, and the best is refined to
    # a factor of two.
    config.rate_factors = (0.25, 1.0, 4.0)
    config.validation_questions = 400
    return config
