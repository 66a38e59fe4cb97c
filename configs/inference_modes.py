"""Ways to fine-tune a generator against ways to answer with it.

Training reads all passages in one prompt (`generator`) or one passage per prompt (`ralt`, `two_phase`,
`joint_token`, `joint_sequence`); answering does either, too.

    python -m experiments inference_modes
    python -m experiments inference_modes \
        --config.name=beams --config.modes="('rag_token',)" --config.beams=8
"""

from ml_collections import ConfigDict

from configs import compare_strategies, settings


def get_config() -> ConfigDict:
    config = settings.base()
    config.name = "inference_modes"
    config.strategies = (
        "none", "generator", "ralt", "two_phase", "joint_token", "joint_sequence"
    )  # fmt: skip
    config.regimes = ("centralised",)  # one, and not "local"
    config.primary_metric = "em"
    config.data.test_questions = 400
    config.learning_rates = compare_strategies.learning_rates()
    config.modes = (
        "concatenated", "ensemble", "rag_token", "rag_sequence_thorough", "rag_sequence_fast", "vote"
    )  # fmt: skip
    config.beams = 0  # for the modes with beams; 0 is the default of each mode
    # Chosen by EM of the ensemble on 400 validation questions, seed 0: 38.2, 38.0, 27.0 and 22.0 at
    # 1e-4, 3.16e-4, 1e-3 and 3.16e-3; untuned 38.2. Most of the loss comes from passages without the
    # answer.
    config.learning_rates.centralised.ralt = 1e-4
    return config
