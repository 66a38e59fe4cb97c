"""Tuned systems of a finished comparison, answering from other stores.

python -m experiments compare_strategies --config=configs/compare_real.py
python -m experiments over_stores
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "over_stores"  # results go to runs/<name>
    config.of = "runs/real"  # the comparison, whose cells of these seeds and regimes are finished
    config.seeds = (0, 1, 2)
    config.split_seeds = ()
    config.regimes = ("centralised", "federated")
    # Kinds of stores (fedrag_jax/retrieval/stores/registry.py), and the strategies to try over each.
    # BM25 reads only the words of a question, so a tuned retriever changes nothing there.
    config.stores = ConfigDict(
        {
            "bm25": ("none", "generator"),
            "hybrid": ("none", "retriever", "generator", "independent"),
        }
    )
    config.primary_metric = "em"
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
