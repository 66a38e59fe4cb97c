"""Runs an experiment.

    python -m experiments compare_strategies
    python -m experiments methods --config.name=mine --config.seeds='(0,)' --config.data.name=squad

The config is configs/<name>.py unless --config names another. Each setting is also a flag, such as
--config.seeds.

Two helpers are commands of their own:

    python -m experiments.choose_learning_rates --config=configs/compare_strategies.py
    python -m experiments.redraw docs/data/table/strategies.csv docs/strategies.png
"""

import importlib
import sys

from experiments.launch import launch

# Modules below `experiments`, which hold an `EXPERIMENT`, or a `run(config, runs)` of their own.
COMMANDS = {
    "compare_strategies": "strategies, centralised, federated and local: the main table",
    "heterogeneity": "skew, number of clients, local steps, participation",
    "methods": "every objective from one start",
    "lora_aggregation": "rules for averaging adapters",
    "compression": "quality against bytes of compressed messages",
    "personalisation": "personal models of clients, against models that clients train alone",
    "attacks": "attacks of hostile clients against robust aggregation rules",
    "privacy": "privacy attacks on training, before and after each defence",
    "index_refresh": "index refresh policies while both encoders are trained",
    "inference_modes": "ways to train against ways to answer",
    "research": "learning to search by policy gradients",
    "leakage": "privacy attacks on the tuned systems of a comparison",
    "over_stores": "tuned systems of a comparison over other stores",
    "public_sets": "tuned systems of a comparison on MMLU or HellaSwag",
    "aloftrag": "label-free fine-tuning: ablation of its steps, and controls",
    "tune_retrieval": "a real retriever on real questions",
    "federated_retrieval": "retrieval from passages that stay with their owners",
    "partition_statistics": "how much the clients of a comparison differ",
}
CONFIGS = {"partition_statistics": "compare_strategies"}  # uses the clients of that comparison


def main() -> None:
    """Runs what the command line names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        known = "\n".join(f"  {name:<22}{about}" for name, about in COMMANDS.items())
        asked = name in ("-h", "--help")
        print(f"{__doc__}\n{known}", file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else f"\nunknown experiment {name!r}" if name else 2)

    def run(config, runs):
        # Imports JAX, once the flags are right.
        from experiments.run import run

        module = importlib.import_module(f"experiments.{name}")
        if hasattr(module, "EXPERIMENT"):
            run(module.EXPERIMENT, config, runs)
        else:
            module.run(config, runs)

    launch(run, f"configs/{CONFIGS.get(name, name)}.py")


if __name__ == "__main__":
    main()
