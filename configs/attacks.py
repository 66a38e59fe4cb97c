"""Hostile clients: each attack against each aggregation rule.

Each strategy is trained by the same clients, some of which attack. Learning rates are those of the
comparison of strategies, which were chosen for averaging honest clients.

    python -m experiments attacks
    python -m experiments attacks --config.name=other --config.attackers="(1, 4)" --config.mode=""
"""

from ml_collections import ConfigDict

from configs import compare_strategies, settings


def get_config() -> ConfigDict:
    config = settings.base()
    settings.matched_alone(config)
    config.name = "attacks"
    config.seeds = (0, 1, 2)
    # On the built-in world, training changes this strategy's scores most. "none" is the untuned system.
    config.strategies = ("none", "retriever")
    config.primary_metric = "recall_at_5"
    # How questions are answered; "" scores only rankings, which takes half the time.
    config.mode = "concatenated"
    config.regimes = ("federated",)
    del config.federated.algorithm, config.federated.algorithm_options  # the rules below
    config.data.own_questions = 0
    config.learning_rates = compare_strategies.learning_rates()

    config.attackers = (5, 7)  # numbers of clients
    # `sends` names the attack that replaces their update (fedrag_jax/federated/attacks.py). `holds`
    # names the poison of their data: "labels" gives each question the answers and passages of another
    # one, "trigger" plants a backdoor, and "passages" adds forgeries of the attackers' passages to the
    # corpus and makes the attackers train on them. All attacks are compared with the first.
    config.attacks = ("none", "label_flip", "sign_flip", "backdoor", "passages", "noise")
    config.known_attacks = ConfigDict(
        {
            "none": {"sends": "", "holds": ""},
            "sign_flip": {"sends": "sign_flip:4", "holds": ""},
            "noise": {"sends": "scaled_noise:4", "holds": ""},
            "label_flip": {"sends": "", "holds": "labels"},
            # With this boost, the mean of 8 clients becomes the mean of the 2 attackers.
            "backdoor": {"sends": "model_replacement:4", "holds": "trigger"},
            "passages": {"sends": "", "holds": "passages"},
        }
    )
    # The trigger leads to one passage and its answer. Attackers train on this number of questions, with
    # and without the trigger. With many questions, few batches contain both forms, and the backdoor is
    # not learned.
    config.trigger = ConfigDict({"text": "cf mn bb tq mb", "questions": 8})
    # Algorithms by name with their options. All weight clients equally, because an attacker may claim
    # any number of examples.
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
