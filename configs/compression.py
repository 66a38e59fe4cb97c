"""Compressed messages: scores against bytes up and down.

Each strategy is trained by the same clients with each kind of message. Learning rates are those of the
comparison of strategies, which were chosen for plain messages.

python -m experiments compression
python -m experiments compression --config.name=joint --config.strategies="('joint_token',)"
"""

from ml_collections import ConfigDict

from configs import compare_strategies, settings


def get_config() -> ConfigDict:
    config = settings.base()
    settings.matched_alone(config)
    config.name = "compression"
    config.seeds = (0, 1, 2)
    config.strategies = ("retriever", "generator")
    config.regimes = ("federated",)
    config.primary_metric = "em"
    config.mode = (
        "concatenated"  # how questions are answered, see fedrag_jax/generation/inference.py
    )
    config.data.own_questions = 0
    config.learning_rates = compare_strategies.learning_rates()
    # Kinds of messages; all are compared with the first.
    config.messages = ("plain", "bfloat16", "int8", "int4", "rotated_int4", "top_10", "top_1")
    # Codecs of updates (up) and models (down), by name (fedrag_jax/federated/compression/by_name.py).
    config.codecs = ConfigDict(
        {
            "plain": {"up": "", "down": ""},
            "bfloat16": {"up": "bfloat16", "down": "bfloat16"},
            "int8": {"up": "int8", "down": "int8"},
            "int4": {"up": "int4", "down": "int8"},
            "rotated_int4": {"up": "rotated_int4", "down": "int8"},
            "top_10": {"up": "top_k:0.1", "down": "int8"},
            "top_1": {"up": "top_k:0.01", "down": "int8"},
        }
    )
    return config
