"""Label-free fine-tuning of silos that share no text: pooled, federated, and each silo alone.

Each topic of the built-in world is a silo. A silo writes questions about its own texts and is tested on
them. In federated training, silos exchange only adapters.

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
    # Steps of each of ten silos; together they are as many as in the ablation.
    config.training.rounds = 4
    config.training.local_steps = 3
    # For each regime, the better of 2e-3 and 5e-3 on 150 validation questions.
    config.learning_rates.federated = 5e-3
    config.learning_rates.local = 2e-3
    return config
