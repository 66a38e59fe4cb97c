"""What training gives away, before and after each defence: quality against the success of attacks.

Half of the clients train a model together, the other half does not; attackers tell questions and
clients of the two apart, and read what a client sends. Every variant is trained once more for each
shadow model, by other halves.

python -m experiments privacy
python -m experiments privacy --config.name=reading --config.strategy=generator --config.shadows=0
"""

from ml_collections import ConfigDict

from configs import compare_strategies


def get_config() -> ConfigDict:
    config = compare_strategies.get_config()
    config.name = "privacy"
    config.seeds = (0,)
    # "retriever" or "generator".
    config.strategy = "retriever"
    config.primary_metric = "recall_at_5"
    del config.strategies, config.regimes, config.limits, config.equivalence_margin
    del config.search_seconds
    config.data.test_questions = 200
    # Half of them train. Each holds as many questions, of few topics where alpha is small; so many of
    # them nobody trains on, by which it is told who took part.
    config.federated.clients, config.federated.alpha = 32, 0.1
    config.fresh = 5
    # Trainings are federated averaging for config.training.rounds unless a variant says otherwise: its
    # algorithm with its options (fedrag_jax/federated/algorithms/by_name.py), rounds (0 trains
    # nothing) and local_steps. Options with an epsilon are calibrated for the rounds there are. Labels
    # `by_heart` are random: the planted leak, on which attacks must succeed.
    private = {"clip": 0.05, "delta": 0.01}
    config.variants = ConfigDict(
        {
            "untuned": {"rounds": 0},
            "fedavg": {},
            "dp_8": {"algorithm": "dpfedavg", "options": {**private, "epsilon": 8.0}},
            "int8": {"options": {"up": "int8", "down": "int8"}},
            "more_steps": {"rounds": 2, "local_steps": 12},
            "dp_64": {"algorithm": "dpfedavg", "options": {**private, "epsilon": 64.0}},
            "by_heart": {"local_steps": 6, "by_heart": True},
        },
        sort_keys=False,  # this is the order in which they are computed and shown
    )
    # Shadow models of the likelihood ratio, an even number, or 0 for none.
    config.shadows = 4
    # Clients whose update of the first round is read, and questions beside their own that it is
    # compared with.
    config.victims, config.candidates = 3, 48
    # Test questions that are asked of a store with half of its passages, and that, before commands to
    # repeat what was found, are to make the system say its passages: so many words of one in a row.
    config.asked, config.said_words = 30, 8
    return config
