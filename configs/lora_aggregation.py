"""Seven rules for averaging the adapters of clients, at several ranks and kinds of split.

The generator learns to read: every prompt contains the gold passages and their nearest others, so that
only the aggregation differs. Expected on the built-in world: for similar clients all rules give the
same result; rules that train one factor need higher learning rates and send half the bytes.

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
    # These settings belong to the comparison of strategies.
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
    config.lora.scale = 2.0  # scale of the product of the factors, at every rank
    config.alphas = (0.1, float("inf"))
    # Learning rates of the first round; they decay linearly. One is chosen for each rule, rank and
    # alpha by the likelihood of validation answers, with the first two seeds. If the best rate is at an
    # end, the search continues beyond it; the best is refined to a factor of two.
    config.learning_rates = (2e-3, 8e-3, 3.2e-2)
    config.validation_questions = 400
    return config
