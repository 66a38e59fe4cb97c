"""Seven fine-tuning strategies in several regimes: the comparison of Lawton et al. 2025, federated.

    python -m experiments compare_strategies
    python -m experiments compare_strategies \
        --config.name=hotpot --config.data.name=hotpotqa --config.models.retriever=FOLDER
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "compare"  # results go to runs/<name>
    # Pairs: of adapters, client sampling and shuffling, and of who holds what; () is the same again.
    config.seeds = (0,)
    config.split_seeds = ()
    config.strategies = (
        "none", "retriever", "generator", "independent", "two_phase", "joint_token",
        "joint_sequence",
    )  # fmt: skip
    # federated_1 is federated with alpha 1, federated_inf with an even split. One that ends in
    # _converged trains until validation stops improving, not for a number of examples.
    config.regimes = ("centralised", "federated", "local", "local_converged")
    # What takes long may be done for some strategies alone, () is all, and for the first so many pairs
    # of seeds, 0 is all: in local regimes, which train a model for each client, and in converged ones.
    config.limits = ConfigDict(
        {
            "local": {"strategies": ("none", "retriever"), "pairs": 0},
            "converged": {"strategies": (), "pairs": 0},
        }
    )
    config.primary_metric = "em"  # what is claimed is claimed of this; decided before a run
    config.equivalence_margin = 2.0  # points within which two scores are called the same; as well
    config.mode = (
        "concatenated"  # how questions are answered, see fedrag_jax/generation/inference.py
    )

    # Data: "world"; a named set (fedrag_jax/data/named_sets.py), out of $FEDRAG_DATA or from the hub;
    # or a folder with questions.jsonl and passages.jsonl. Without labels, training questions do not
    # tell their gold passages. Numbers of questions are of a random sample (files are sorted by
    # article); 0 is all there are. Where no client holds the topics of test questions, so many training
    # questions that are left over, of passages that nobody trains on, stand for what is asked about
    # clients' own topics. Controls ask a sample of the test set.
    config.data = ConfigDict(
        {
            "name": "world",
            "labels": True,
            "test_questions": 0,
            "train_questions": 0,
            "own_questions": 0,
            "control_questions": 200,
            "sample_seed": 0,
        }
    )
    # Where a named set is read: "hub", "local" ($FEDRAG_DATA), a folder with copies of repositories of
    # the hub, or "" for $FEDRAG_DATA where it is there and else the hub; and at which commit.
    config.data.source = ""
    config.data.revision = ""
    # Any other set of the hub, or a local table (Parquet, Arrow, CSV, JSON): name it, its configuration
    # and the columns that it has (fedrag_jax/data/columns.py).
    config.data.hub_config = ""
    config.data.columns = ConfigDict(
        dict.fromkeys(
            ("question", "answers", "passages", "titles", "gold", "topic", "split", "id"), ""
        )
    )
    # Other passages than those of the set: a set of the hub, a local table, passages.jsonl, or a folder
    # of documents. Longer passages are cut to so many tokens of the retriever's, as fedrag index does
    # (0: as they are; 200 for documents).
    config.data.corpus = ""
    config.data.corpus_options = ConfigDict(
        {
            "hub_config": "",
            "revision": "",
            "columns": {"id": "id", "title": "title", "text": "text"},
        }
    )
    config.data.passage_tokens = 0

    # Models: built-in, a Hugging Face folder or a hub id. Large generators want "instruct" prompts, or
    # "chat", which puts them into the generator's own chat template.
    config.models = ConfigDict()
    config.models.retriever = "builtin:encoder"
    # What comes before questions and passages for the retriever, and how it compares their vectors
    # ("cosine", "dot", "euclidean"); "" is as its model says.
    config.models.query_prompt = ""
    config.models.document_prompt = ""
    config.models.similarity = ""
    config.models.generator = "builtin:decoder"
    config.models.prompt_style = "compact"
    # Validation questions that every prompt shows with their answers, without passages.
    config.models.shots = 0
    # The generator's frozen base: as which type, its layers in few bits ("int8", "int4", "nf4") or not
    # (""), and cut over how many devices. Where there are more, clients are dealt out over groups of so
    # many, `federated.devices` of them.
    config.models.dtype = "float32"
    config.models.quantize = ""
    config.models.devices = 1
    # What the backward pass through the generator computes again: "selective" keeps what its linear
    # layers give, "full" keeps nothing, which takes least memory and a third longer, "none" everything.
    config.models.remat = "selective"
    config.models.max_passage_tokens = 256
    config.models.max_answer_tokens = 16  # that are trained on and written, reasoning included
    config.lora = ConfigDict()
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.targets = ("q_proj", "v_proj")
    # Passages that are read together, and passages that training marginalises over where the retriever
    # moves; cosines are scaled by so much in training losses. 20, the usual scale, leaves p(z|x) of the
    # built-in encoder so peaked that a marginal likelihood teaches it little.
    config.retrieval = ConfigDict({"top_k": 5, "marginal_k": 10, "score_scale": 10.0})
    # What searches the passages in training and evaluation, with its options
    # (fedrag_jax/retrieval/index/by_name.py): "flat" and "device" are exact. Vectors of passages are
    # kept as float32 or, half as large, float16.
    config.retrieval.index = "flat"
    config.retrieval.index_options = ConfigDict()
    config.retrieval.vectors = "float32"

    # Clients differ in `column`; alpha = inf is an even split. Their training is dealt out over so many
    # devices, of all hosts; 0 takes all there are. Of the clients a share is drawn for each round.
    config.federated = ConfigDict(
        {"clients": 8, "alpha": 0.1, "column": "topic", "devices": 0, "participation": 1.0}
    )
    # What their updates become, see fedrag_jax/federated/algorithms/by_name.py. Regimes that name an
    # algorithm, such as federated:fedprox, have options under its name: algorithms = {"fedprox":
    # {"mu": 0.1}}.
    config.federated.algorithm = "fedavg"
    config.federated.algorithm_options = ConfigDict()
    config.federated.algorithms = ConfigDict()

    # Every regime sees rounds x local_steps x clients x batch_size examples.
    config.training = ConfigDict()
    config.training.rounds = 8
    config.training.local_steps = 3
    config.training.batch_size = 4
    config.training.group_size = 1  # fastest on a CPU; 0 measures it, once on a device
    config.training.checkpoint_every = 4  # rounds
    # Regimes that end in _converged take at most `cap` times as many steps, every client by itself
    # too. After `every` rounds' worth of steps so many validation questions are asked; training ends
    # when `patience` times in a row were no better than the best, which is kept.
    config.training.converged = ConfigDict({"cap": 4, "every": 2, "patience": 2, "questions": 200})

    # Of the first round, falling linearly. Chosen on validation questions by
    # experiments/choose_learning_rates.py; joint training takes those of the two phases. Regimes that
    # are not here take those of their kind and budget, or of their kind. They are of two seeds;
    # those marked "older" of one, from grids of nine points a factor of 2.4 apart.
    config.learning_rates = ConfigDict()
    for regime, retriever, generator, marginal_generator, marginal_retriever in (
        ("centralised", 4e-4, 8e-4, 4e-4, 8e-4),
        ("centralised_converged", 2e-4, 6.4e-3, 5e-5, 4e-4),
        ("federated", 3.2e-3, 6.4e-3, 3.2e-3, 1.6e-3),
        ("federated_converged", 1.6e-3, 1.6e-3, 8e-4, 8e-4),
        ("federated_1", 4.22e-3, 7.5e-3, 1e-4, 7.5e-4),  # older
        ("federated_inf", 4.22e-3, 1e-4, 3.16e-3, 4.22e-3),  # older
        ("local", 1e-4, 2e-4, 3.2e-3, 2e-4),
        ("local_converged", 4e-4, 1.6e-3, 3.16e-3, 3.16e-4),  # the marginal ones older
    ):
        config.learning_rates[regime] = ConfigDict(
            {
                "retriever": retriever,
                "generator": generator,
                "marginal_generator": marginal_generator,
                "marginal_retriever": marginal_retriever,
            }
        )

    # Device-seconds that choose_learning_rates took for each of them, beside other work on two cores.
    config.search_seconds = ConfigDict(
        {
            "centralised": {
                "retriever": 8, "generator": 216, "marginal_generator": 306, "marginal_retriever": 107,
            },
            "centralised_converged": {
                "retriever": 38, "generator": 807, "marginal_generator": 1642,
                "marginal_retriever": 196,
            },
            "federated": {
                "retriever": 11, "generator": 231, "marginal_generator": 374, "marginal_retriever": 85,
            },
            "federated_converged": {
                "retriever": 40, "generator": 895, "marginal_generator": 1242,
                "marginal_retriever": 212,
            },
            "local": {
                "retriever": 6, "generator": 108, "marginal_generator": 140, "marginal_retriever": 77,
            },
            "local_converged": {"retriever": 174, "generator": 2712},
        }
    )  # fmt: skip

    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
