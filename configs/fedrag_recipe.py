"""The fine-tuning that FedRAG (2506.09200) offers, which is RA-DIT's (2310.01352): RALT for the
generator, LSR for the retriever, and both.

    python -m experiments.fedrag_recipe --config=configs/fedrag_recipe.py
    python -m experiments.fedrag_recipe --config=configs/fedrag_recipe.py \
        --config.name=concatenated --config.mode=concatenated
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "fedrag_recipe"
    config.seeds = (0, 1, 2)
    config.strategies = ("none", "ralt", "lsr", "ra_dit")
    config.settings = ("centralised", "federated")
    # RA-DIT answers from a prompt for each passage, weighed by the retriever.
    config.mode = "ensemble"
    return config
