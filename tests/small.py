"""A comparison of seconds."""

from configs.compare_strategies import get_config


def small():
    config = get_config()
    config.name = "small"
    config.strategies = ("none", "retriever", "two_phase")
    config.settings = ("federated", "local")
    config.data.train_questions = 160
    config.data.test_questions = 60
    config.federated.clients = 2
    config.federated.alpha = 1.0
    config.training.rounds = 1
    config.training.local_steps = 1
    config.wandb.mode = "disabled"
    return config
