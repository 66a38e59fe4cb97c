"""Every objective from the same start, for as many steps: does it improve what it trains?

    python -m experiments methods
    python -m experiments methods \
        --config.name=some --config.objectives="('lsr', 'pdist')" --config.regimes="('federated',)"
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "methods"
    config.seeds = (0, 1, 2)
    config.regimes = ("centralised",)
    for name in (
        "strategies",
        "limits",
        "learning_rates",
        "search_seconds",
        "equivalence_margin",
        "primary_metric",
        "mode",
    ):
        del config[name]
    del config.data.own_questions
    # () is all of fedrag_jax/strategies/objectives.py, and "no_op", the first of them at a learning
    # rate of 0, which must change nothing.
    config.objectives = ()
    # Of each part in the first round, falling linearly, times the factor that does best on so many
    # validation questions with the first seed; an end that is best is gone beyond. The retriever is
    # judged by MRR@10, the generator by the likelihood of answers, both together too.
    config.learning_rates = ConfigDict(
        {"query": 7.5e-4, "document": 7.5e-4, "head": 1e-2, "adapters": 5.62e-4}
    )
    config.rate_factors = (0.1, 0.4, 1.6)
    config.validation_questions = 400
    return config
