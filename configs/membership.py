"""Attacks that tell the training questions of tuned systems of a finished comparison from others.

python -m experiments compare_strategies --config=configs/compare_real.py
python -m experiments membership
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "membership"  # results go to runs/<name>
    config.of = "runs/real"  # the comparison, whose cells of these seeds and regimes are finished
    config.seeds = (0, 1, 2)
    config.split_seeds = ()
    config.strategies = ("none", "retriever", "generator")
    config.regimes = ("centralised", "federated")
    # Number of training questions, and of others, or all. The others are questions about topics that
    # were trained on, where the comparison has such (data.own_questions); else they are test questions.
    config.questions = 128
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
