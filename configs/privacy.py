"""What training reveals, before and after each defence: quality against the success of attacks.

Half of the clients train a model together. Attackers try to separate the questions and clients of this
half from those of the other half, and to read a client's update. Every variant is trained again for
each shadow model, by other halves.

python -m experiments privacy
python -m experiments privacy --config.name=reading --config.strategy=generator --config.shadows=0
python -m experiments privacy --config=configs/privacy.py:clipping
python -m experiments privacy --config=configs/privacy.py:clients --config.federated.clients=320
"""

from ml_collections import ConfigDict

from configs import compare_strategies, settings


def get_config(which: str = "") -> ConfigDict:
    """The defences; or one of `VARIANTS`.

    Raises:
      ValueError: another.
    """
    if which and which not in VARIANTS:
        raise ValueError(f"{which!r} unknown; choose among {[*VARIANTS]}, or leave it out")
    config = settings.base()
    settings.matched_alone(config)
    config.name = f"privacy_{which}" if which else "privacy"
    config.seeds = (0,)
    # "retriever" or "generator".
    config.strategy = "retriever"
    config.primary_metric = "recall_at_5"
    config.mode = "concatenated"  # how questions are answered, if EM or F1 is the primary metric
    config.learning_rates = compare_strategies.learning_rates()
    # All clients of the half train in every round, by the variant's algorithm, on one device. A cell
    # is computed without a checkpoint.
    del config.federated.participation, config.federated.devices, config.training.checkpoint_every
    del config.federated.algorithm, config.federated.algorithm_options
    config.data.test_questions = 200
    # Half of the clients train. All hold the same number of questions, about few topics if alpha is
    # small. No client trains on `fresh` of its questions: attacks on participation use them.
    config.federated.clients, config.federated.alpha = 32, 0.1
    config.fresh = 5
    # The default is federated averaging for config.training.rounds. A variant may set another algorithm
    # and its options (fedrag_jax/federated/algorithms/by_name.py), rounds (0 trains nothing) and
    # local_steps. Noise for an epsilon is calibrated for the variant's rounds. With `by_heart`, labels
    # are random: a planted leak, on which attacks must succeed.
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
    # Number of shadow models for the likelihood ratio: even, or 0 for none.
    config.shadows = 4
    # Number of clients whose update of the first round is attacked, and number of other questions that
    # are compared with the update.
    config.victims, config.candidates = 3, 48
    # Number of test questions for the attacks on a system that holds half of the passages. A passage
    # counts as repeated if an answer has this number of its words in a row.
    config.asked, config.said_words = 30, 8
    if which:
        VARIANTS[which](config)
    return config


def clipping(config) -> None:
    """Clipping bounds for the generator's adapters, at an epsilon of 64."""
    config.strategy, config.primary_metric, config.shadows = "generator", "em", 0
    _with_bounds(config, (0.05, 0.2, 0.8, 3.2), {"delta": 0.01, "epsilon": 64.0})


def clients(config) -> None:
    """An epsilon of 8 for the retriever; give config.federated.clients, among which all questions are
    divided."""
    config.shadows, config.fresh = 0, 1
    _with_bounds(config, (0.05, 0.2), {"delta": 0.005, "epsilon": 8.0})


def _with_bounds(config, bounds, private: dict) -> None:
    config.variants = ConfigDict({"untuned": {"rounds": 0}, "fedavg": {}}, sort_keys=False)
    for clip in bounds:
        name = f"clip_{clip:g}".replace(".", "_")
        options = {"clip": clip, **private}
        config.variants[name] = ConfigDict({"algorithm": "dpfedavg", "options": options})


VARIANTS = {variant.__name__: variant for variant in (clipping, clients)}
