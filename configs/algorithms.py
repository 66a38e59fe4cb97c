"""Algorithms beside FedAvg, for independent and joint tuning of clients that differ.

python -m experiments.choose_learning_rates --config=configs/algorithms.py
python -m experiments compare_strategies --config=configs/algorithms.py
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "algorithms"
    config.seeds = (0, 1, 2, 3, 4)
    config.strategies = ("none", "independent", "joint_token")
    config.regimes = (
        "centralised", "federated", "federated:fedprox", "federated:fedadam", "federated:scaffold",
        "federated:ffa", "federated:flora",
    )  # fmt: skip
    config.federated.algorithms = ConfigDict(
        {"fedprox": {"mu": 0.01}, "fedadam": {"learning_rate": 0.01}}
    )
    return config
