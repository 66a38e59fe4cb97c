"""What hostile clients can do to a federation under each way to average: attack against rule.

Every strategy is trained by the same clients, of whom some attack, at the learning rates of the
comparison of strategies, which were chosen for the mean of honest clients.

    python -m experiments attacks
    python -m experiments attacks --config.name=other --config.attackers="(1, 4)" --config.mode=""
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "attacks"
    config.seeds = (0, 1, 2)
    # Of the built-in world's the one that training moves most. "none" is the untuned system.
    config.strategies = ("none", "retriever")
    config.primary_metric = "recall_at_5"
    # How questions are answered; "" scores rankings alone, which takes half the time.
    config.mode = "concatenated"
    config.regimes = ("federated",)
    del config["limits"], config["equivalence_margin"], config["search_seconds"]

    config.attackers = (5, 7)  # numbers of clients
    # What they send in place of their update (fedrag_jax/federated/attacks.py), and what they train
    # on: "labels" gives questions another one's answers and passages, "trigger" plants a backdoor,
    # "passages" adds forgeries of all passages that attackers hold to the corpus and has them train on
    # these. The first is what others are compared with.
    config.attacks = ("none", "label_flip", "sign_flip", "backdoor", "passages", "noise")
    config.known_attacks = ConfigDict(
        {
            "none": {"sends": "", "holds": ""},
            "sign_flip": {"sends": "sign_flip:4", "holds": ""},
            "noise": {"sends": "scaled_noise:4", "holds": ""},
            "label_flip": {"sends": "", "holds": "labels"},
            # Boosted so that the mean of 8 becomes that of the 2 attackers.
            "backdoor": {"sends": "model_replacement:4", "holds": "trigger"},
            "passages": {"sends": "", "holds": "passages"},
        }
    )
    # The trigger wants one passage and its answer. Attackers train on so many questions with and
    # without it: over many, few batches hold both, and the backdoor is not learned.
    config.trigger = ConfigDict({"text": "cf mn bb tq mb", "questions": 8})
    # Algorithms by name with their options. All count clients alike, because an attacker may claim any
    # number of examples.
    config.rules = (
        "mean", "median", "multi_krum", "norm_bounded", "trimmed_mean", "krum", "filtered",
    )  # fmt: skip
    config.known_rules = ConfigDict(
        {
            "mean": {"algorithm": "fedavg", "weighting": "uniform"},
            "median": {"algorithm": "median"},
            "trimmed_mean": {"algorithm": "trimmed_mean", "byzantine": 2},
            "krum": {"algorithm": "krum", "byzantine": 2},
            "multi_krum": {"algorithm": "multi_krum", "byzantine": 2},
            "norm_bounded": {"algorithm": "norm_bounded"},
            "filtered": {"algorithm": "filtered"},
        }
    )
    return config
