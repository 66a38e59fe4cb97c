"""The fine-tuning that FedRAG (2506.09200) offers, which is RA-DIT's (2310.01352): RALT for the
generator, LSR for the retriever, and both.

    python -m experiments compare_strategies --config=configs/fedrag_recipe.py
    python -m experiments compare_strategies --config=configs/fedrag_recipe.py \
        --config.name=concatenated --config.mode=concatenated
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "fedrag_recipe"
    config.seeds = (0, 1, 2)
    config.strategies = ("none", "ralt", "lsr", "ra_dit")
    config.regimes = ("centralised", "federated")
    # RA-DIT answers from one prompt for each passage, weighted by the retriever's scores.
    config.mode = "ensemble"
    # Chosen by EM of the ensemble on 200 validation questions, seed 0 (choose_learning_rates). No rate
    # of RALT exceeds 38.5, the score of the lowest rate. These are the highest rates that reach it.
    config.learning_rates.centralised.update({"ralt": 1e-4, "lsr": 7.5e-4})
    config.learning_rates.federated.update({"ralt": 1e-3, "lsr": 2.37e-3})
    return config
