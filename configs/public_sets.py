"""Tuned systems of a finished comparison, scored on a public set.

    python -m experiments public_sets
    python -m experiments public_sets --config.name=hellaswag --config.benchmark=hellaswag \
        --config.ways="('likelihood',)" --config.coverage=0.0

FedRAG's own experiment judges RALT on MMLU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "public_sets"  # results go to runs/<name>
    config.of = "runs/real_ra_dit"  # the comparison, whose cells of these seeds are finished
    config.strategies = ("none", "ralt")
    config.regimes = ("centralised", "federated")
    config.seeds = (0,)
    config.split_seeds = ()
    config.benchmark = "mmlu"  # a set with choices, see fedrag_jax/evaluation/benchmarks/sets.py
    # Asks only groups of questions (MMLU's subjects) in which, for at least this share of questions, a
    # passage that the untuned system reads contains the right choice; 0 asks all groups.
    config.coverage = 0.1
    config.questions = 1500  # size of a random sample; 0 uses all
    config.ways = ("likelihood", "letters")  # ways to choose, see Benchmarker.run
    config.corpora = ("own", "none")  # with the passages of the comparison, and without any
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
