"""Learning to search by policy gradients, against tuning with one retrieval, on the built-in world.

    python -m experiments research
    python -m experiments research --config=configs/research.py:federated
    python -m experiments research --config=configs/research.py:real

Two-hop questions ask about the maker of a work: the first passage has to be read to ask for the second.
As many one-hop questions are trained on as two-hop ones.
"""

from ml_collections import ConfigDict

from configs import compare_real, compare_strategies


def get_config(which: str = "world") -> ConfigDict:
    """`world`; `federated`, one seed of it with clients; `real`, models and questions of a real set."""
    config = (compare_real if which == "real" else compare_strategies).get_config()
    config.name = "research" if which == "world" else f"research_{which}"
    # What is trained where. Without searching there is `none`, and any strategy of compare_strategies;
    # `search_form` is the warm-up of `search`, `search_unmasked` pushes the policy to write what it
    # found, too.
    single = ("none", "generator", "independent")
    config.variants = ConfigDict(
        {"centralised": (*single, "search_form", "search", "search_unmasked")}
    )
    for name in (
        "regimes", "strategies", "limits", "mode", "primary_metric", "equivalence_margin",
        "search_seconds",
    ):  # fmt: skip
        del config[name]
    del config.data.own_questions, config.data.control_questions, config.federated.algorithms
    config.seeds = (0, 1, 2)
    # Variants with fewer pairs of seeds than the others; 0 is all. The ablation takes about as long
    # as the other variants together.
    config.pairs = ConfigDict({"search_unmasked": 1})
    # With the main table's adapters (rank 8, queries and values) so few steps do not teach the form.
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.lora.targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip
    # Rollouts of a question; what it is worth that searches found the answer, and what each costs, of a
    # reward of at most 1; beta of the KL penalty. A second search seldom pays before it is well used,
    # and one-hop questions do better without it: without the penalty some seeds end with a single
    # search for every question (two-hop EM 0), whatever the bonus, the cost and the scaling.
    config.policy = ConfigDict(
        {
            "group": 8, "bonus": 0.2, "cost": 0.0, "scaled": True, "kl": 0.1,
            "aggregation": "token",
        }
    )  # fmt: skip
    # A round rolls out clients x local_steps x batch_size questions, and trains on them in so many
    # steps of batch_size.
    config.training.rounds, config.training.local_steps, config.training.batch_size = 16, 1, 4
    if which == "federated":
        config.seeds = (0,)
        config.variants = ConfigDict(
            {r: ("generator", "search") for r in ("centralised", "federated", "local_converged")}
        )
        # Two local steps of four clients: with one step of larger batches data in one place, too, ends
        # with a single search for every question.
        config.federated.clients, config.training.local_steps = 4, 2
        config.training.converged = ConfigDict(
            {"cap": 1, "every": 6, "patience": 1, "questions": 40}
        )
    if which == "real":
        config.data.name = "hotpotqa"
        config.data.train_questions, config.data.test_questions = 256, 100
        config.data.passage_tokens = 96
        config.seeds = (0,)
        config.variants = ConfigDict({"centralised": ("none", "generator", "search")})
        config.training.rounds = 4
    # Rates of the first round, falling linearly; not searched. A round of federated training moves the
    # model by the mean of its clients' steps, centralised training takes them one after another.
    for regime, rates in config.learning_rates.items():
        times = 4 if regime.startswith("federated") else 1
        rates.search_form, rates.search = 3e-3 * times, 1e-3 * times
    return config
