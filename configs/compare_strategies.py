"""Seven fine-tuning strategies in several regimes: the comparison of Lawton et al. 2025, federated.

    python -m experiments compare_strategies
    python -m experiments compare_strategies \
        --config.name=hotpot --config.data.name=hotpotqa --config.models.retriever=FOLDER
"""

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    config = settings.base()
    config.name = "compare"  # results go to runs/<name>
    config.strategies = (
        "none", "retriever", "generator", "independent", "two_phase", "joint_token",
        "joint_sequence",
    )  # fmt: skip
    # federated_1 is federated with alpha 1, federated_inf with an even split. Regimes that end in
    # _converged train until validation stops improving, not for a fixed number of examples.
    config.regimes = ("centralised", "federated", "local", "local_converged")
    # Slow regimes can be limited to some strategies (() is all) and to the first pairs of seeds (0 is
    # all): local regimes, which train a model for each client, and converged regimes.
    config.limits = ConfigDict(
        {
            "local": {"strategies": ("none", "retriever"), "pairs": 0},
            "converged": {"strategies": (), "pairs": 0},
        }
    )
    config.primary_metric = "em"  # the metric of all claims; choose it before a run
    config.equivalence_margin = 2.0  # margin of equivalence in points; choose it before a run
    # How questions are answered, see fedrag_jax/generation/inference.py.
    config.mode = "concatenated"

    # If no client holds the topics of test questions, `own_questions` remaining training questions,
    # about passages that no client trains on, give the scores on clients' own topics. Controls use a
    # sample of the test set.
    config.data.own_questions, config.data.control_questions = 0, 200

    # For regimes that name an algorithm, such as federated:fedprox: its options, under its name, such
    # as algorithms = {"fedprox": {"mu": 0.1}}.
    config.federated.algorithms = ConfigDict()

    config.learning_rates = learning_rates()

    # Device-seconds that choose_learning_rates took for each rate, with other work on the two cores.
    config.search_seconds = ConfigDict(
        {
            "centralised": {
                "retriever": 8, "generator": 216, "marginal_generator": 306, "marginal_retriever": 107,
            },
            "centralised_converged": {
                "retriever": 38, "generator": 807, "marginal_generator": 1642,
                "marginal_retriever": 196,
            },
            "federated": {
                "retriever": 11, "generator": 231, "marginal_generator": 374, "marginal_retriever": 85,
            },
            "federated_converged": {
                "retriever": 40, "generator": 895, "marginal_generator": 1242,
                "marginal_retriever": 212,
            },
            "local": {
                "retriever": 6, "generator": 108, "marginal_generator": 140, "marginal_retriever": 77,
            },
            "local_converged": {"retriever": 174, "generator": 2712},
        }
    )  # fmt: skip
    return config


def learning_rates() -> ConfigDict:
    """Learning rates of the first round by regime and part, for the built-in models and world; they
    decay linearly."""
    # They were chosen on validation questions by experiments/choose_learning_rates.py; joint training
    # uses those of the two phases. Regimes that are not listed use the rates of their kind and budget,
    # or of their kind. Rates were chosen with two seeds; those marked "older" with one seed, from grids
    # of nine points a factor of 2.4 apart.
    rates = ConfigDict()
    for regime, retriever, generator, marginal_generator, marginal_retriever in (
        ("centralised", 4e-4, 8e-4, 4e-4, 8e-4),
        ("centralised_converged", 2e-4, 6.4e-3, 5e-5, 4e-4),
        ("federated", 3.2e-3, 6.4e-3, 3.2e-3, 1.6e-3),
        ("federated_converged", 1.6e-3, 1.6e-3, 8e-4, 8e-4),
        ("federated_1", 4.22e-3, 7.5e-3, 1e-4, 7.5e-4),  # older
        ("federated_inf", 4.22e-3, 1e-4, 3.16e-3, 4.22e-3),  # older
        ("local", 1e-4, 2e-4, 3.2e-3, 2e-4),
        ("local_converged", 4e-4, 1.6e-3, 3.16e-3, 3.16e-4),  # the marginal ones older
    ):
        rates[regime] = ConfigDict(
            {
                "retriever": retriever,
                "generator": generator,
                "marginal_generator": marginal_generator,
                "marginal_retriever": marginal_retriever,
            }
        )
    return rates
