"""RALT, LSR and both, centralised and federated: the comparison of strategies for RA-DIT's.

    python -m experiments.fedrag_recipe --config=configs/fedrag_recipe.py

Results go to runs/<name>/ as those of experiments/compare_strategies.py do.
"""

from experiments.compare_strategies import run
from experiments.launch import launch

if __name__ == "__main__":
    launch(run, "configs/fedrag_recipe.py")
