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

The last is for a language model of a folder or hub id, at the paper's rate; those below suit the
built-in one alone.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "aloftrag"  # results go to runs/<name>
    # Pairs: of adapters, shuffling and the order of passages, and (unused here) of splits.
    config.seeds = (0,)
    config.split_seeds = ()
    # Of label-free data, see VARIANTS of experiments/aloftrag.py; `base` is untuned.
    config.variants = (
        "base", "all", "without_step_1", "without_step_3", "pretraining_world",
        "shuffled_citations",
    )  # fmt: skip
    # "centralised" trains on what all texts gave; "federated" and "local" need silos.
    config.regimes = ("centralised",)
    # Whether each topic is a silo of its own, whose questions are answered from its own texts.
    config.silos = False

    # "chatty_world" is the built-in world with documents in each topic's own chatter, which the
    # generator never saw; "xquad"; or a folder as for experiments/compare_strategies.py, of which test
    # questions are asked, and no others ("validation" to choose rates by). Two-hop questions are left
    # out, as one text is asked about. 0 is all there are.
    config.data = ConfigDict(
        {"name": "chatty_world", "passages": 0, "split": "test", "test_questions": 0}
    )

    # Who rates texts and asks about them: the generator itself, or `model` behind an OpenAI-compatible
    # endpoint ("http://localhost:8000/v1"). Prompts are "compact" (of the built-in decoder),
    # "instruct", "examples" (of English texts, for generators too small for instructions) or a JSON
    # file of label_free/prompts.py; they ask for `language`, where they name one.
    config.author = ConfigDict(
        {"endpoint": "", "model": "", "prompts": "compact", "language": "English"}
    )
    config.author.languages = ConfigDict()  # of topics, where they differ
    # Answers are judged so many times by a model behind an endpoint, too, if there is one.
    config.judge = ConfigDict({"endpoint": "", "model": "", "repeats": 3})

    config.models = ConfigDict()
    config.models.retriever = "builtin:encoder"
    config.models.query_prompt = ""  # and how vectors are compared; "" is as the model says
    config.models.document_prompt = ""
    config.models.similarity = ""
    config.models.generator = "builtin:citing"
    config.models.prompt_style = "compact_cited"  # or "cited", "chat_cited"
    config.models.dtype = "float32"
    config.models.quantize = ""
    config.models.devices = 1
    config.models.remat = "selective"  # or "full", "none", see configs/compare_strategies.py
    config.models.max_passage_tokens = 256
    config.models.max_answer_tokens = 24  # that are trained on and written, citation included
    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip

    # The share of questions trained on without their passage, of which none is to be cited, so that
    # abstaining is not unlearned. The paper's is 0, as that of the variant `always_answerable`.
    config.unanswerable = 0.02
    # Passages of a context: trained on with the last number, read with each.
    config.contexts = (2, 5, 10)

    # Every variant takes rounds x local_steps x clients steps; clients are the silos, or one.
    config.training = ConfigDict()
    config.training.rounds = 4
    config.training.local_steps = 32
    config.training.batch_size = 8
    config.training.devices = 0  # that share the silos of federated training; 0 are all
    # Of the first round, falling linearly: of those searched on validation questions, the highest at
    # which training on pretraining-world data does not raise citations.
    config.learning_rates = ConfigDict({"centralised": 1e-3, "federated": 1e-3, "local": 1e-3})
    # Of the variant that trains the query encoder: of 1e-5 and 5e-5 on validation questions, of which
    # the higher lowers recall.
    config.retriever_learning_rate = 1e-5

    config.wandb = ConfigDict({"mode": "offline", "project": "fedrag_jax"})
    return config
