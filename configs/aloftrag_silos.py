"""Label-free fine-tuning of silos that share no text: pooled, federated and each by itself.

Every topic of the built-in world is a silo. Each asks about its own texts and is asked about them; in
federated training adapters travel, and nothing else.

    python -m experiments aloftrag --config=configs/aloftrag_silos.py
"""

from ml_collections import ConfigDict

from configs import aloftrag


def get_config() -> ConfigDict:
    config = aloftrag.get_config()
    config.name = "aloftrag_silos"
    config.silos = True
    config.variants = ("base", "all")
    config.regimes = ("centralised", "federated", "local")
    # Of each of ten silos: as many steps together as the ablation takes.
    config.training.rounds = 4
    config.training.local_steps = 3
    # The better of 2e-3 and 5e-3 on 150 validation questions, for each regime.
    config.learning_rates.federated = 5e-3
    config.learning_rates.local = 2e-3
    return config
