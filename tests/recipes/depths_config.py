"""Depths."""

from configs import compare_strategies


def get_config():
    config = compare_strategies.get_config()
    config.name, config.wandb.mode = "depths", "disabled"
    config.depths = (1, 5)
    return config
