"""Label-free fine-tuning of silos in twelve languages: XQuAD, hard negatives by all-MiniLM-L6-v2.

The built-in generator cannot write about real texts. An endpoint writes the questions in each silo's
language, and a generator that reads those languages is trained.

    python -m experiments aloftrag --config=configs/aloftrag_xquad.py \
        --config.author.endpoint=http://localhost:8000/v1 --config.author.model=MODEL \
        --config.models.generator=FOLDER --config.models.prompt_style=chat_cited
"""

from ml_collections import ConfigDict

from configs import aloftrag_silos


def get_config() -> ConfigDict:
    config = aloftrag_silos.get_config()
    config.name = "aloftrag_xquad"
    config.data.name = "xquad"
    config.variants = ("base", "without_step_3")  # the paper's best
    config.models.retriever = "minilm"
    config.models.max_passage_tokens = 512  # paragraphs; some scripts take many tokens
    config.models.max_answer_tokens = 64
    config.author.prompts = "instruct"
    config.author.language = "the language of the question"  # of the generator's answers
    config.author.languages = ConfigDict(
        {
            "ar": "Arabic", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
            "hi": "Hindi", "ro": "Romanian", "ru": "Russian", "th": "Thai", "tr": "Turkish",
            "vi": "Vietnamese", "zh": "Chinese",
        }
    )  # fmt: skip
    return config
