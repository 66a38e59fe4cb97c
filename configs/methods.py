"""Every objective from the same start and for the same number of steps: does it improve its part?

    python -m experiments methods
    python -m experiments methods \
        --config.name=some --config.objectives="('lsr', 'pdist')" --config.regimes="('federated',)"
"""

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    config = settings.base()
    config.name = "methods"
    config.seeds = (0, 1, 2)
    config.regimes = ("centralised",)
    config.data.control_questions = 200  # a sample of the test set
    # () is all of fedrag_jax/strategies/objectives.py and "no_op": the first objective at a learning
    # rate of 0, which must change nothing.
    config.objectives = ()
    # Learning rates of each part in the first round; they decay linearly. They are multiplied by the
    # factor that is best on this number of validation questions with the first seed; if it is at an
    # end, the search continues beyond it. The retriever is judged by MRR@10, the generator, alone or
    # with the retriever, by the likelihood of answers.
    config.learning_rates = ConfigDict(
        {"query": 7.5e-4, "document": 7.5e-4, "head": 1e-2, "adapters": 5.62e-4}
    )
    config.rate_factors = (0.1, 0.4, 1.6)
    config.validation_questions = 400
    return config
