"""Attacks on tuned systems of a finished comparison: on training questions and on passages.

python -m experiments compare_strategies --config=configs/compare_real.py
python -m experiments leakage
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "leakage"  # results go to runs/<name>
    config.of = "runs/real"  # the comparison, whose cells of these seeds and regimes are finished
    config.seeds = (0, 1, 2)
    config.split_seeds = ()
    config.strategies = ("none", "retriever", "generator")
    config.regimes = ("centralised", "federated")
    # Folders of two or more comparisons that trained the same systems on other questions: the shadow
    # models of a likelihood ratio, for the regimes that they have. Such as two of
    #   python -m experiments compare_strategies --config=configs/compare_real.py:shadow \
    #       --config.name=real_shadow1 --config.data.sample_seed=1
    config.shadows = ()
    # Number of training questions, and of others, or all. The others are questions about topics that
    # were trained on, where the comparison has such (data.own_questions); else they are test questions.
    config.questions = 128
    # Number of test questions whose passages prompts ask the system to repeat. A passage counts as
    # repeated if an answer has this number of its words in a row.
    config.prompted, config.said_words = 20, 8
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
