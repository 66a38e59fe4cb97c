"""Seven rules for averaging the adapters of clients, at several ranks and kinds of split.

The generator learns to read: every prompt contains the gold passages and their nearest others, so that
only the aggregation differs. Expected on the built-in world: for similar clients all rules give the
same result; rules that train one factor need higher learning rates and send half the bytes.

    python -m experiments lora_aggregation
    python -m experiments lora_aggregation \
        --config.name=wide --config.ranks="(32,)" --config.rules="('fedit', 'fedex')"
"""

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    config = settings.base()
    settings.matched_alone(config)
    config.name = "lora_aggregation"
    config.seeds = (0, 1, 2, 3, 4)
    config.data.control_questions = 200  # a sample of the test set
    # Settings of retriever training, and those that are varied below.
    del config.retrieval.marginal_k, config.retrieval.score_scale, config.training.checkpoint_every
    del config.lora.rank, config.lora.alpha
    del config.federated.alpha, config.federated.algorithm, config.federated.algorithm_options

    config.rules = ("fedit", "ffa", "rolora", "flora", "fedex", "flexlora", "fedsa")
    config.ranks = (2, 8)
    config.lora.scale = 2.0  # scale of the product of the factors, at every rank
    config.alphas = (0.1, float("inf"))
    config.mixtures_alpha = 0.1  # of the clients whose mixtures of questions judge all models
    # Learning rates of the first round; they decay linearly. One is chosen for each rule, rank and
    # alpha by the likelihood of validation answers, with the first two seeds. If the best rate is at an
    # end, the search continues beyond it; the best is refined to a factor of two.
    config.learning_rates = (2e-3, 8e-3, 3.2e-2)
    config.validation_questions = 400
    return config
