"""Seven rules for averaging the adapters of clients, at several ranks and kinds of split.

The generator learns to read: every prompt holds the gold passages and the nearest others, so that what
differs is the aggregation alone. Expected on the built-in world: where clients are alike the rules come
to the same; rules that train one factor need higher learning rates and send half.

    python -m experiments lora_aggregation
    python -m experiments lora_aggregation \
        --config.name=wide --config.ranks="(32,)" --config.rules="('fedit', 'fedex')"
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "lora_aggregation"
    config.seeds = (0, 1, 2, 3, 4)
    # These are of the comparison of strategies.
    for name in (
        "strategies",
        "limits",
        "regimes",
        "learning_rates",
        "search_seconds",
        "equivalence_margin",
        "primary_metric",
        "mode",
    ):
        del config[name]
    del config.data.own_questions
    for name in ("marginal_k", "score_scale"):
        del config.retrieval[name]
    del config.training["checkpoint_every"]
    del config.lora["rank"], config.lora["alpha"]
    for name in ("alpha", "algorithm", "algorithm_options", "algorithms"):
        del config.federated[name]

    config.rules = ("fedit", "ffa", "rolora", "flora", "fedex", "flexlora", "fedsa")
    config.ranks = (2, 8)
    config.lora.scale = 2.0  # of the product of the factors, at every rank
    config.alphas = (0.1, float("inf"))
    # Of the first round, falling linearly. One is chosen for each rule, rank and alpha by the
    # likelihood of validation answers, with the first two seeds; an end that is best is gone beyond,
    # and the best is refined to a factor of two.
    config.learning_rates = (2e-3, 8e-3, 3.2e-2)
    config.validation_questions = 400
    return config
