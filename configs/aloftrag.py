"""Label-free fine-tuning: the ablation of ALoFTRAG (2501.11929), with controls, from raw texts alone.

Expected on the built-in world: `all` cites some ten points better than `base` and answers some six
points better; neither control cites better.

    python -m experiments aloftrag
    python -m experiments aloftrag --config.name=questions \
        --config.variants="('base', 'without_step_3', 'questions_4', 'unanswerable', 'retriever')"
    python -m experiments aloftrag --config.name=mine \
        --config.data.name=FOLDER --config.models.generator=FOLDER \
        --config.models.prompt_style=chat_cited --config.models.max_answer_tokens=128 \
        --config.author.prompts=instruct --config.learning_rates.centralised=2e-4

The last command is for a language model from a folder or the hub, at the paper's rate; the rates below
suit only the built-in model.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "aloftrag"  # results go to runs/<name>
    # Pairs of seeds: for adapters, shuffling and the order of passages, and (unused here) for splits.
    config.seeds = (0,)
    config.split_seeds = ()
    # Variants of the label-free data, see VARIANTS of experiments/aloftrag.py; `base` is untuned.
    config.variants = (
        "base", "all", "without_step_1", "without_step_3", "pretraining_world",
        "shuffled_citations",
    )  # fmt: skip
    # "centralised" trains on the questions from all texts; "federated" and "local" need silos.
    config.regimes = ("centralised",)
    # Whether each topic is a silo; its questions are then answered from its own texts.
    config.silos = False

    # Data: "chatty_world", the built-in world with documents that contain chatter of their topic, which
    # the generator never saw; "xquad"; or a folder as for experiments/compare_strategies.py. Only test
    # questions are asked ("validation" to choose rates). Two-hop questions are left out, because a
    # written question is about one text. 0 uses all questions.
    config.data = ConfigDict(
        {"name": "chatty_world", "passages": 0, "split": "test", "test_questions": 0}
    )

    # The author, which rates texts and writes questions: the generator itself, or `model` behind an
    # OpenAI-compatible endpoint ("http://localhost:8000/v1"). Prompts are "compact" (for the built-in
    # decoder), "instruct", "short" or "examples" (English), for generators too small for instructions,
    # or a JSON file of label_free/prompts.py. Prompts that name a language ask for `language`.
    config.author = ConfigDict(
        {"endpoint": "", "model": "", "prompts": "compact", "language": "English"}
    )
    config.author.languages = ConfigDict()  # by topic, if they differ
    # Number of times that a model behind an endpoint, if given, also judges each answer.
    config.judge = ConfigDict({"endpoint": "", "model": "", "repeats": 3})

    config.models = ConfigDict()
    config.models.retriever = "builtin:encoder"
    config.models.query_prompt = ""  # and the similarity; "" is the model's own
    config.models.document_prompt = ""
    config.models.similarity = ""
    config.models.generator = "builtin:citing"
    config.models.prompt_style = "compact_cited"  # or "cited", "chat_cited"
    config.models.dtype = "float32"
    config.models.quantize = ""
    config.models.devices = 1
    config.models.remat = "selective"  # or "full", "none", see configs/compare_strategies.py
    config.models.max_passage_tokens = 256
    config.models.max_answer_tokens = 24  # in training and generation, including the citation
    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip

    # Share of training questions without their passage, for which no passage may be cited. They keep
    # the model from unlearning to abstain. The paper uses 0, as does the variant `always_answerable`.
    config.unanswerable = 0.02
    # Numbers of passages in a context: training uses the last, evaluation uses each.
    config.contexts = (2, 5, 10)

    # Every variant takes rounds x local_steps x clients steps; clients are the silos, or one.
    config.training = ConfigDict()
    config.training.rounds = 4
    config.training.local_steps = 32
    config.training.batch_size = 8
    config.training.devices = 0  # for the silos of federated training; 0 uses all
    # Learning rates of the first round; they decay linearly. They are the highest of those searched on
    # validation questions at which training on pretraining-world data does not raise citations.
    config.learning_rates = ConfigDict({"centralised": 1e-3, "federated": 1e-3, "local": 1e-3})
    # Rate of the variant that trains the query encoder, chosen from 1e-5 and 5e-5 on validation
    # questions; the higher one lowers recall.
    config.retriever_learning_rate = 1e-5

    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
