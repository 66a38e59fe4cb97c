"""Five algorithms and FedAvg, for independent and joint tuning by clients that differ.

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
    # Learning rates chosen by the first command with --questions=200, and the device-seconds it took on
    # two cores with other work.
    parts = "retriever", "generator", "marginal_generator", "marginal_retriever"
    for algorithm, rates, seconds in (
        ("fedprox", (3.2e-3, 6.4e-3, 3.2e-3, 3.2e-3), (11, 399, 498, 291)),
        ("fedadam", (8e-4, 8e-4, 8e-4, 1.6e-3), (22, 447, 458, 173)),
        ("scaffold", (1.5625e-4, 1e-2, 2e-2, 3.2e-4), (19, 441, 559, 130)),
        ("ffa", (3.2e-3, 3.2e-3, 3.2e-3, 3.2e-3), (13, 176, 220, 112)),
        ("flora", (3.2e-3, 3.2e-3, 6.4e-3, 3.2e-3), (7, 199, 327, 131)),
    ):
        regime = f"federated:{algorithm}"
        config.learning_rates[regime] = ConfigDict(dict(zip(parts, rates, strict=True)))
        config.search_seconds[regime] = ConfigDict(dict(zip(parts, seconds, strict=True)))
    return config
