"""Depths."""

from configs import settings


def get_config():
    config = settings.base()
    config.name, config.wandb.mode = "depths", "disabled"
    config.depths = (1, 5)
    return config
