"""Settings that most experiments share, with their defaults; each experiment's config adds its own."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Seeds, data, models, retrieval, clients and training; the built-in models and world."""
    config = ConfigDict()
    # Pairs of seeds: for adapters, client sampling and shuffling, and for the partition; () repeats
    # `seeds`.
    config.seeds = (0,)
    config.split_seeds = ()

    # Data: "world"; a named data set (fedrag_jax/data/named_sets.py), from $FEDRAG_DATA or the hub; or
    # a folder with questions.jsonl and passages.jsonl. labels=False hides the gold passages of training
    # questions. Numbers of questions are sizes of random samples (files are sorted by article); 0 is
    # all.
    config.data = ConfigDict(
        {
            "name": "world", "labels": True, "test_questions": 0, "train_questions": 0, "sample_seed": 0
        }
    )  # fmt: skip
    # Source of a named data set: "hub", "local" ($FEDRAG_DATA), a folder with copies of hub
    # repositories, or "" for $FEDRAG_DATA if present, else the hub; and the commit.
    config.data.source = ""
    config.data.revision = ""
    # Any other data set of the hub, or a local table (Parquet, Arrow, CSV, JSON): give its name, its
    # configuration and its columns (fedrag_jax/data/columns.py).
    config.data.hub_config = ""
    config.data.columns = ConfigDict(
        dict.fromkeys(
            ("question", "answers", "passages", "titles", "gold", "topic", "split", "id"), ""
        )
    )
    # Another corpus instead of the data set's passages: a data set of the hub, a local table,
    # passages.jsonl, or a folder of documents. Passages longer than `passage_tokens` (by the
    # retriever's tokenizer) are split, as fedrag index does (0: no split; 200 for documents).
    config.data.corpus = ""
    config.data.corpus_options = ConfigDict(
        {
            "hub_config": "",
            "revision": "",
            "columns": {"id": "id", "title": "title", "text": "text"},
        }
    )
    config.data.passage_tokens = 0

    # Models: built-in, a Hugging Face folder or a hub id. Use "instruct" prompts for large generators,
    # or "chat", which uses the generator's own chat template.
    config.models = ConfigDict()
    config.models.retriever = "builtin:encoder"
    # Prefixes of questions and passages for the retriever, and its similarity ("cosine", "dot",
    # "euclidean"); "" is the model's own.
    config.models.query_prompt = ""
    config.models.document_prompt = ""
    config.models.similarity = ""
    config.models.generator = "builtin:decoder"
    config.models.prompt_style = "compact"
    # Number of validation questions shown in every prompt as examples, with answers and without
    # passages.
    config.models.shots = 0
    # The generator's frozen base: its type, the quantisation of its layers ("int8", "int4", "nf4" or
    # ""), and the number of devices over which it is split. With more devices, clients are distributed
    # over `federated.devices` groups of this many devices.
    config.models.dtype = "float32"
    config.models.quantize = ""
    config.models.devices = 1
    # What the backward pass through the generator recomputes: "selective" keeps the outputs of linear
    # layers; "full" keeps nothing, which uses the least memory and takes a third longer; "none" keeps
    # everything.
    config.models.remat = "selective"
    config.models.max_passage_tokens = 256
    config.models.max_answer_tokens = 16  # in training and generation, including reasoning
    config.lora = ConfigDict()
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.targets = ("q_proj", "v_proj")
    # Number of passages read together, number of passages that retriever training marginalises over,
    # and the scale of cosines in training losses. With the usual scale of 20, p(z|x) of the built-in
    # encoder is so peaked that a marginal likelihood teaches it little.
    config.retrieval = ConfigDict({"top_k": 5, "marginal_k": 10, "score_scale": 10.0})
    # The index for training and evaluation, with its options (fedrag_jax/retrieval/index/by_name.py):
    # "flat" and "device" are exact. Vectors of passages are stored as float32 or, at half the size,
    # float16.
    config.retrieval.index = "flat"
    config.retrieval.index_options = ConfigDict()
    config.retrieval.vectors = "float32"

    # Clients differ in `column`; alpha = inf is an even split. Clients are distributed over `devices`
    # devices of all hosts; 0 uses all. `participation` is the share of clients sampled per round.
    config.federated = ConfigDict(
        {"clients": 8, "alpha": 0.1, "column": "topic", "devices": 0, "participation": 1.0}
    )
    # The federated algorithm with its options, see fedrag_jax/federated/algorithms/by_name.py.
    config.federated.algorithm = "fedavg"
    config.federated.algorithm_options = ConfigDict()

    # Every regime sees rounds x local_steps x clients x batch_size examples.
    config.training = ConfigDict()
    config.training.rounds = 8
    config.training.local_steps = 3
    config.training.batch_size = 4
    config.training.group_size = 1  # fastest on a CPU; 0 measures the fastest once per device
    config.training.checkpoint_every = 4  # rounds
    # Regimes that end in _converged take at most `cap` times as many steps; so does a lone client.
    # After every `every` rounds' worth of steps, the loss on `questions` validation questions is
    # computed. Training ends after `patience` evaluations in a row without improvement; the best model
    # is kept.
    config.training.converged = ConfigDict({"cap": 4, "every": 2, "patience": 2, "questions": 200})

    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config


def matched_alone(config: ConfigDict) -> None:
    """Removes the settings of regimes that train until validation stops improving."""
    converged = config.training.converged
    del converged.cap, converged.every, converged.patience
