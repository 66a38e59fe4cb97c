"""Refresh policies of the index while both encoders are trained: cost and benefit.

Both encoders learn from a frozen generator's likelihoods (PDist). `query_side` trains only the query
encoder and re-embeds nothing.

    python -m experiments index_refresh
    python -m experiments index_refresh \
        --config.name=wider --config.policies.rerank_40.candidates=100
"""

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    config = settings.base()
    settings.matched_alone(config)
    config.name = "index_refresh"
    config.seeds = (0, 1, 2)
    config.regimes = ("centralised", "federated")
    # Both encoders are averaged by FedAvg alone, and a cell is computed without a checkpoint.
    del config.federated.algorithm, config.federated.algorithm_options
    del config.training.checkpoint_every
    config.objective = (
        "pdist"  # or another with a generator as teacher, see strategies/objectives.py
    )
    # Settings of `retrieval.refresh.Policy`; "query_side" trains only the query encoder. There are
    # `training.rounds` retrievals.
    config.policies = ConfigDict(
        {
            "never": {"every": 0},
            "every_4": {"every": 4},
            "every_2": {"every": 2},
            "every_1": {"every": 1},
            "stale_20": {"staleness": 0.2},
            "rerank_40": {"every": 0, "candidates": 40},
            "in_use_40": {"every": 0, "candidates": 40, "keep": True},
            "query_side": {},
        }
    )
    # Learning rates of both encoders in the first round; they decay linearly. They are multiplied by
    # the factor that is best on this number of validation questions, with the first seed and an index
    # that is always fresh.
    config.learning_rates = ConfigDict({"centralised": 7.5e-4, "federated": 1.78e-3})
    config.rate_factors = (0.25, 1.0, 4.0)
    config.validation_questions = 400
    config.probe_questions = 200  # validation questions for measuring staleness
    return config
